"""Hold MoleGrad to the gates of its testing plan: python -m scripts.validate --steps=100 --json"""

from molegrad.gpt.report.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
