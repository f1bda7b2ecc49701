"""Evaluate a run's fine-tuned model: python -m scripts.chat_eval --run=NAME [--tasks=...]"""

from molegrad.gpt.evaluate.evaluate import main_chat

if __name__ == "__main__":
    raise SystemExit(main_chat())
