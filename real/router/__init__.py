"""The classifier of prompts: how it is fitted, kept in a file, asked and judged."""
