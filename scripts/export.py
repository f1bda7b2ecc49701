"""Write a run's model for other libraries: python -m scripts.export --run=NAME --output=DIR"""

from molegrad.gpt.export import main

if __name__ == "__main__":
    raise SystemExit(main())
