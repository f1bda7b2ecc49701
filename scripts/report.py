"""Write and show the report of runs: python -m scripts.report --runs=NAME,NAME"""

from molegrad.gpt.report.report import main

if __name__ == "__main__":
    raise SystemExit(main())
