"""The real thing: vLLM experts, the gateway in front of them, and users, all from the fleet file that ``sim`` reads."""
