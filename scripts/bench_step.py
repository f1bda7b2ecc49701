"""Time whole training steps: python -m scripts.bench_step --device=cpu --json"""

from molegrad.bench.step import main

if __name__ == "__main__":
    raise SystemExit(main())
