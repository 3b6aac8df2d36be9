"""The experts: their checkpoints, the cores and GPUs they get, and one vLLM server for each replica."""
