"""Time the weight-gradient ops: python -m scripts.bench_grad --device=cpu --json"""

from molegrad.bench.grad import main

if __name__ == "__main__":
    raise SystemExit(main())
