"""Compare methods of training: python -m scripts.compare --json"""

from molegrad.lab.sweep import main

if __name__ == "__main__":
    raise SystemExit(main())
