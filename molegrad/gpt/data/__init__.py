"""Text, tokenizers and batches."""
