"""Measuring real engines, and the router, within a time budget."""
