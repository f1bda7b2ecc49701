"""Schedules: how many steps, and the learning rate and momentum of each.

Everything here is a pure function of the step, so that a resumed run needs no state for it.
"""


def total_steps(
    tokens_per_step: int,
    num_iterations: int = -1,
    max_train_tokens: int = -1,
    target_param_data_ratio: float = 0.0,
    parameters: int = 0,
) -> int:
    """Number of steps: `num_iterations` if given, else by tokens, else by tokens per parameter.

    `max_train_tokens` is a limit where `num_iterations` is given too. At least 1.

    Raises:
        ValueError: none of the three is given.
    """
    if num_iterations > 0:
        steps = num_iterations
        if max_train_tokens > 0:
            steps = min(steps, max_train_tokens // tokens_per_step)
    elif max_train_tokens > 0:
        steps = max_train_tokens // tokens_per_step
    elif target_param_data_ratio > 0 and parameters > 0:
        steps = int(target_param_data_ratio * parameters) // tokens_per_step
    else:
        raise ValueError(
            "how long to train? Give num_iterations, max_train_tokens or target_param_data_ratio"
        )
    return max(1, steps)


def lr_multiplier(
    step: int,
    steps: int,
    warmup_steps: int = 0,
    warmdown_ratio: float = 0.4,
    final_lr_frac: float = 0.0,
) -> float:
    """Factor on every learning rate at `step` of `steps`, counted from 0.

    Linear from 1/warmup_steps to 1, then 1, then linear to `final_lr_frac` (which would be reached
    at `steps`) over the last `warmdown_ratio` of the run.
    """
    warmdown = round(warmdown_ratio * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown or warmdown == 0:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final_lr_frac


def momentum_at(step: int, start: float = 0.85, end: float = 0.95, warmup_steps: int = 300):
    """Muon's momentum at `step`: linear from `start` to `end` over `warmup_steps`."""
    share = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    return (1 - share) * start + share * end
