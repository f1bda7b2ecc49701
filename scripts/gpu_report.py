"""The results of scripts/gpu_check.sh in one JSON file and one table."""

from molegrad.bench.gpu import main

if __name__ == "__main__":
    raise SystemExit(main())
