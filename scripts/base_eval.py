"""Evaluate a run's base model: python -m scripts.base_eval --run=NAME [--tasks=...]"""

from molegrad.gpt.evaluate.evaluate import main_base

if __name__ == "__main__":
    raise SystemExit(main_base())
