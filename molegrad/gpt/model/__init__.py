"""The transformer, its loss, and what it leaves for the backward pass."""
