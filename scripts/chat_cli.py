"""Chat with a trained model: python -m scripts.chat_cli --run=NAME [--prompt="..."]"""

from molegrad.gpt.chat.terminal import main

if __name__ == "__main__":
    raise SystemExit(main())
