"""Compare dense and low-rank training: python -m scripts.compare --json"""

from molegrad.bench.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
