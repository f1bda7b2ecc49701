"""Base training: a GPT from scratch on text, from flags to the last checkpoint.

What: `base_train(config)` reads the data, builds the model, converts it where --enable_streaming
asks for that, trains it with `molegrad.gpt.train.loop.Trainer` and leaves under
$MOLEGRAD_HOME/runs/RUN/base the configuration, the metrics, the tokenizer and the checkpoints.

How to run:

    python -m scripts.base_train --run=first --depth=4 --num-iterations=200
    torchrun --nproc-per-node=2 -m scripts.base_train -- --depth=12
    python -m scripts.base_train --run=first --depth=4 --num-iterations=200 --resume
"""

from collections.abc import Callable

import torch

from molegrad.gpt import paths
from molegrad.gpt.data.corpus import open_corpus
from molegrad.gpt.data.loader import PackedLoader, validation_batches
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.data.tokens import CorpusTokens
from molegrad.gpt.model.bpb import bits_per_byte
from molegrad.gpt.model.engine import generate
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import flags, schedule, setup
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, device_of, resolve
from molegrad.gpt.train.loop import Hooks
from molegrad.gpt.train.stage import Stage

BuildOptimizers = Callable[[GPT, BaseTrainConfig], list[torch.optim.Optimizer]]
PROMPTS = (
    "Return a new array",
    "The function computes",
    "If the value is negative,",
    "The capital of France is",
)


@flags.command("base_train")
def main(argv: list[str] | None = None) -> int:
    """The command: 0 when training reached its end, 130 when a signal ended it earlier."""
    config = flags.parse(BaseTrainConfig, argv, prog="python -m scripts.base_train")
    return 130 if base_train(config)["interrupted"] else 0


def base_train(config: BaseTrainConfig, optimizers: BuildOptimizers | None = None) -> dict:
    """Train; returns the last metrics, with "interrupted", "folder" and "best_bpb".

    Args:
        optimizers: (model, resolved config) -> optimizers, in place of
            `molegrad.gpt.train.setup.build_optimizers`. Their groups need no "initial_lr" and no
            "name".

    Raises:
        ValueError, FileNotFoundError: flags or data do not fit; the message names the remedy.
        molegrad.gpt.train.guard.NonFiniteError: the loss or a gradient became NaN or infinite.
    """
    # What this run is, and whether it has been made already.
    processes = setup.Processes.from_environment()
    rank, world = processes.rank, processes.world_size
    device = device_of(config, processes.local_rank)
    config = resolve(config, device, world)
    setup.prepare_device(config, device)
    tokenizer = Tokenizer.load(paths.tokenizer_dir(config.tokenizer))
    corpus = open_corpus(config.data, config.val_data, config.data_max_bytes)
    inputs = {"tokenizer": tokenizer.fingerprint, "corpus": corpus.manifest["sha256"]}
    stage = Stage.open(config, "base", processes, inputs)
    if stage.start.done:
        return stage.already_done()

    with processes.joined(device):
        # Batches to train on, and those whose bits per byte are measured.
        rows, length, dtype = config.device_batch_size, config.max_seq_len, compute_dtype(config)
        train = CorpusTokens(corpus, "train", tokenizer)
        loader = PackedLoader(train, rows, length, device, rank, world, config.seed)
        held_out, token_bytes = CorpusTokens(corpus, "val", tokenizer), tokenizer.token_bytes()

        def validation(steps: int):
            return validation_batches(held_out, rows, length, steps, device, rank, world)

        if config.eval_every >= 0:
            next(validation(1))  # too little text is found here, not after the first hours

        # The model, its layers converted, and its optimizers.
        model = GPT(model_config(config, tokenizer.vocab_size), seed=config.seed)
        built = setup.build(model, config, device, optimizers)
        steps = total_steps(config, model)

        # Training.
        def evaluate() -> dict:
            batches = validation(max(1, config.eval_tokens // (rows * length * world)))
            return {"val/bpb": bits_per_byte(model, batches, token_bytes, dtype, world)}

        def sample() -> list[str]:
            return sample_texts(model, tokenizer, dtype)

        record = {"corpus": corpus.manifest}
        return stage.run(built, tokenizer, loader, steps, Hooks(evaluate, sample), record)


def model_config(config: BaseTrainConfig, vocab_size: int) -> GPTConfig:
    """The sizes that the flags and the tokenizer ask for."""
    return GPTConfig(
        depth=config.depth,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        kv_groups=config.kv_groups,
        vocab_size=vocab_size,
        max_seq_len=config.max_seq_len,
        loss_chunk=config.loss_chunk,
    )


def total_steps(config: BaseTrainConfig, model: GPT) -> int:
    """Steps of a base training, from whichever flag sets them."""
    counts = model.count_parameters()
    return schedule.total_steps(
        config.total_batch_size,
        config.num_iterations,
        config.max_train_tokens,
        config.target_param_data_ratio * (counts["matrix"] + counts["head"]),
    )


def sample_texts(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, tokens: int = 24):
    """Greedy continuations of `PROMPTS`, as text."""
    was_training = model.training
    model.eval()
    texts = []
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        for prompt in PROMPTS:
            ids = [tokenizer.bos, *tokenizer.encode(prompt)][-model.config.max_seq_len :]
            stop = [tokenizer.bos]
            answer = generate(model, ids, tokens, temperature=0.0, stop_tokens=stop)
            texts.append(tokenizer.decode([*ids[1:], *answer]))
    model.train(was_training)
    return texts
