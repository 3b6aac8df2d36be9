"""Speed and memory, printed beside their targets. Machines are noisy: nothing here fails."""
