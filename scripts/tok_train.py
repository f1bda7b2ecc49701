"""Train the tokenizer: python -m scripts.tok_train --vocab-size=4096 [--data=...] [--run=NAME]."""

from molegrad.gpt.flags import parse
from molegrad.gpt.tok_train import TokTrainConfig, tok_train

if __name__ == "__main__":
    tok_train(parse(TokTrainConfig, prog="tok_train"))
