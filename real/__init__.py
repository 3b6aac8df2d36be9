"""The real thing: what ``sim`` predicts, run with vLLM experts behind the router, from the same fleet file."""
