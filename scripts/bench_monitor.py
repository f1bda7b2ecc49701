"""Time what watching a run costs: python -m scripts.bench_monitor --device=cpu --json"""

from molegrad.bench.monitor import main

if __name__ == "__main__":
    raise SystemExit(main())
