"""Real users: the prompts they send, the connections they hold, and the record of what they saw."""
