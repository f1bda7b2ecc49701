"""Predict peak memory: python -m scripts.memory_plan --depth=12 --max-seq-len=8192 --card=32"""

from molegrad.memory.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
