"""Measure peak memory against length: python -m scripts.bench_memory --device=cpu --json"""

from molegrad.bench.memory import main

if __name__ == "__main__":
    raise SystemExit(main())
