"""The real thing: a gateway and its vLLM experts, and users who load them, from the same fleet file as ``simulate``."""
