"""Predict what a training run takes: python -m scripts.budget --depth=12 --max-seq-len=8192"""

from molegrad.gpt.train.budget import main

if __name__ == "__main__":
    raise SystemExit(main())
