"""A fleet in service: its engines and its gateway started, kept running and stopped."""
