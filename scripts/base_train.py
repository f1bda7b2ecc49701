"""Train a GPT from scratch: python -m scripts.base_train --depth=4 --help"""

from molegrad.gpt.train.base import main

if __name__ == "__main__":
    raise SystemExit(main())
