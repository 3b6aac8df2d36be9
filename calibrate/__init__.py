"""Measures real engines and fits service curves for ``sim``."""
