"""Memory of a run before it runs: a prediction and what fits a card."""
