"""Fine-tune a run's base model on conversations: python -m scripts.chat_sft --run=NAME --help"""

from molegrad.gpt.train.sft import main

if __name__ == "__main__":
    raise SystemExit(main())
