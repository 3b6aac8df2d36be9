"""The gateway: an OpenAI-compatible server that sends each prompt to the expert of its class."""
