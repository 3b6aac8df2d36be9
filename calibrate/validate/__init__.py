"""How wrong predictions are on measured runs."""
