"""What a run left, for people."""
