"""A stand-in for vLLM in tests of what starts and watches it."""
