"""Train the tokenizer: python -m scripts.tok_train --vocab-size=4096 [--data=...] [--run=NAME]."""

from molegrad.gpt.train.tok_train import main

if __name__ == "__main__":
    raise SystemExit(main())
