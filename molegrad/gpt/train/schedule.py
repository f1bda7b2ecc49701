"""Schedules: how many steps, and the learning rate and momentum of each.

Everything here is a pure function of the step, so that a resumed run needs no state for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from molegrad.optim import Muon


@dataclass(frozen=True)
class Schedule:
    """The course of a run of `steps` steps.

    warmup_steps: of a linear rise of every learning rate. warmdown_ratio: share of the run, its
    last, over which they fall linearly to final_lr_frac of their full values. momentum: Muon's,
    after a linear rise from momentum_start over momentum_warmup_steps.
    """

    steps: int
    warmup_steps: int = 0
    warmdown_ratio: float = 0.4
    final_lr_frac: float = 0.0
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup_steps: int = 300

    def lr_multiplier(self, step: int) -> float:
        """Factor on every learning rate at `step`, counted from 0.

        Linear from 1/warmup_steps to 1, then 1, then linear to `final_lr_frac`, which would be
        reached at `steps`.
        """
        warmdown = round(self.warmdown_ratio * self.steps)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step <= self.steps - warmdown or warmdown == 0:
            return 1.0
        left = (self.steps - step) / warmdown
        return left + (1 - left) * self.final_lr_frac

    def momentum_at(self, step: int) -> float:
        """Muon's momentum at `step`, counted from 0."""
        rise = self.momentum_warmup_steps
        share = min(1.0, step / rise) if rise > 0 else 1.0
        return (1 - share) * self.momentum_start + share * self.momentum

    def apply(self, optimizers: Iterable[torch.optim.Optimizer], step: int) -> float:
        """Set the learning rates, from each group's "initial_lr", and Muon's momentum of `step`;
        returns the multiplier."""
        multiplier = self.lr_multiplier(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if isinstance(optimizer, Muon):
                    group["momentum"] = self.momentum_at(step)
        return multiplier


def total_steps(
    tokens_per_step: int,
    num_iterations: int = -1,
    max_train_tokens: int = -1,
    wanted_tokens: float = 0.0,
) -> int:
    """Number of steps: `num_iterations` if given, else by tokens; at least 1.

    `max_train_tokens` is a limit where `num_iterations` is given too; `wanted_tokens` counts where
    neither is.
    """
    if num_iterations > 0:
        steps = num_iterations
        if max_train_tokens > 0:
            steps = min(steps, max_train_tokens // tokens_per_step)
    else:
        steps = int(max_train_tokens if max_train_tokens > 0 else wanted_tokens) // tokens_per_step
    return max(1, steps)
