"""Panels on top of saewb, for Jupyter."""
