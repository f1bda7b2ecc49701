"""What a training run will take, before it starts: tokens, FLOPs, hours, dollars.

    python -m scripts.budget --depth=12 --max-seq-len=8192 --vocab-size=32768

It takes every flag of base training, so that the very flags of a run can be priced, and three of
its own: which GPU, at what utilisation, at what price. It is a prediction from operation counts;
what a run really took stands in its metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.train import flags, hardware, setup
from molegrad.gpt.train.base import model_config, total_steps
from molegrad.gpt.train.config import BaseTrainConfig, resolve
from molegrad.gpt.train.flags import flag


@dataclass(frozen=True)
class BudgetConfig(BaseTrainConfig):
    """Predict the hours and dollars of a training run from its flags.

    Raises:
        ValueError: an unknown GPU, or a utilisation or price out of range.
    """

    gpu: str = flag("RTX 5090", f"one of {', '.join(hardware.PEAK_BF16)}")
    expected_mfu: float = flag(0.4, "model FLOPs utilisation to expect, as a share")
    dollars_per_hour: tuple[float, float] = flag((0.69, 1.14), "lowest and highest rent")
    vocab_size: int = flag(32768, "entries of the tokenizer")
    runs: int = flag(1, "how many runs of this length (2: with a dense baseline)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu not in hardware.PEAK_BF16:
            known = ", ".join(hardware.PEAK_BF16)
            raise ValueError(f"gpu={self.gpu!r} is not known: choose among {known}")
        if not 0 < self.expected_mfu <= 1:
            raise ValueError(f"expected_mfu must lie in (0, 1], got {self.expected_mfu}")
        if min(self.dollars_per_hour) < 0 or self.runs < 1:
            raise ValueError("dollars_per_hour must not be negative, and runs at least 1")


@dataclass(frozen=True)
class Budget:
    """The prediction; `str()` is its text."""

    steps: int
    tokens: int
    flops: float  # of one run
    hours: float  # of all runs
    dollars: tuple[float, float]
    config: BudgetConfig

    def __str__(self) -> str:
        c = self.config
        runs = f"{c.runs} runs" if c.runs > 1 else "1 run"
        return (
            f"{runs} of {self.steps:,} steps, {self.tokens / 1e9:.3g} billion tokens and "
            f"{self.flops:.3g} FLOPs each: about {self.hours:.1f} hours on one {c.gpu} at "
            f"{100 * c.expected_mfu:.0f}% utilisation, ${self.dollars[0]:.2f} to "
            f"${self.dollars[1]:.2f} at ${c.dollars_per_hour[0]:.2f} to "
            f"${c.dollars_per_hour[1]:.2f} an hour"
        )


def predict(config: BudgetConfig) -> Budget:
    """Count the operations of the model the flags describe; nothing of its size is allocated."""
    config = resolve(config, torch.device("cuda"))
    with torch.device("meta"):
        model = GPT(model_config(config, config.vocab_size))
    setup.equip(model, config)
    steps = total_steps(config, model)
    tokens = steps * config.total_batch_size
    flops = hardware.flops_per_token(model, config.max_seq_len).actual * tokens
    speed = hardware.PEAK_BF16[config.gpu] * config.expected_mfu
    hours = config.runs * flops / speed / 3600
    low, high = config.dollars_per_hour
    return Budget(steps, tokens, flops, hours, (hours * low, hours * high), config)


@flags.command("budget")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    print(predict(flags.parse(BudgetConfig, argv, prog="python -m scripts.budget")))
    return 0
