"""A fleet predicted and run for real, side by side."""
