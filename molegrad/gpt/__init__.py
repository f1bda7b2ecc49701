"""The training pipeline as a library: tokenizer, data, model, training, evaluation, chat."""
