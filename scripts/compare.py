"""Compare methods of training: python -m scripts.compare --json"""

from molegrad.lab.command import main

if __name__ == "__main__":
    raise SystemExit(main())
