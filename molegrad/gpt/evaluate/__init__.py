"""Held-out quality."""
