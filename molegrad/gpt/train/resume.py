"""Going on from a checkpoint: what a step that was begun has left, and what may differ from before.

What: `accumulated_state` and `load_accumulated` keep and put back the work of the micro-batches of
an unfinished step; `check_batches` says whether the sizes of batches fit.

A step is made of micro-batches of --device-batch-size sequences, and the loader's sequences come in
the same order whatever that is. With the same --total-batch-size, another --device-batch-size
therefore cuts the same step at other places, and what follows depends on the method:

    no MoleGrad, factored tangent   the same up to rounding: sums over tokens
    sampled, projected              other draws of the same unbiased estimate; an int8 momentum
                                    rounds at other places
    dense tangent, dense power      refused: bases turn, and an estimate is cut to its rank, with
                                    every backward pass; other passes are another method
    factored power                  refused: not linear in the gradient, it takes one micro-batch
                                    a step

In fine-tuning a micro-batch's loss is the mean over its own targets, so the weight of a
conversation among others moves a little as well.
"""

import torch
from torch import Tensor, nn

from molegrad.gpt.train.checkpoint import Checkpoint
from molegrad.linear import MoleLinear

_MOMENTA = ("momentum", "momentum_scale")


def accumulated_state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients, and the momenta that backward passes add to, by name. The tensors are the model's
    own: save them before anything goes on."""
    state = {f"grad/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return state | {f"momentum/{name}": p.detach() for name, p in _momenta(model).items()}


@torch.no_grad()
def load_accumulated(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `accumulated_state` gave; after optimizers and bases.

    Raises:
        ValueError: a name or a shape is not the model's.
    """
    momenta = {f"momentum/{name}": p for name, p in _momenta(model).items()}
    trained = {f"grad/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    own = trained | momenta
    differ = sorted(momenta.keys() - state.keys())
    differ += [k for k, t in state.items() if k not in own or own[k].shape != t.shape]
    if differ:
        raise ValueError(
            f"the checkpoint is of the middle of a step, and what the step has accumulated does "
            f"not fit this model ({', '.join(differ[:4])}): resume with the same flags"
        )
    for key, tensor in state.items():
        if key in momenta:
            momenta[key].copy_(tensor)
        else:
            own[key].grad = tensor.to(own[key].device, own[key].dtype, copy=True)


def _momenta(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in model.named_modules()
        if isinstance(layer, MoleLinear)
        for key in _MOMENTA
        if getattr(layer, key) is not None
    }


def batch_sizes(config) -> dict[str, int]:
    """What a checkpoint keeps of a resolved configuration for `check_batches`."""
    names = ("total_batch_size", "device_batch_size", "max_seq_len")
    return {name: getattr(config, name) for name in names}


def check_batches(
    saved: Checkpoint, config, masked: bool = False, micro_done: int = 0
) -> tuple[int, str]:
    """Whether a run with `config` may go on from `saved`.

    Args:
        config: resolved flags.
        masked: some targets do not count, as in fine-tuning.
        micro_done: micro-batches of the unfinished step, as the checkpoint counts them.

    Returns:
        the same count in micro-batches of `config`, and a note for people, "" where all is equal.

    Raises:
        ValueError: a step would be another one; the message says what to do.
    """
    now = batch_sizes(config)
    before = saved.extra.get("batches") or {k: saved.config.get(k, v) for k, v in now.items()}
    for name in ("total_batch_size", "max_seq_len"):
        if before[name] != now[name]:
            raise ValueError(
                f"{saved.folder} was saved with {name}={before[name]}, this run has {now[name]}: a "
                "step must have the same tokens, as schedules and counts go by steps; resume with "
                f"--{name.replace('_', '-')}={before[name]}"
            )
    old, new = before["device_batch_size"], now["device_batch_size"]
    if old == new:
        return micro_done, ""
    back = f"resume with --device-batch-size={old}"
    change = f"{saved.folder} was saved with device_batch_size={old}, this run has {new}"
    streaming = config.streaming_config()
    sampled = streaming is not None and streaming.estimator.unbiased
    if streaming is not None and not sampled:
        if streaming.gradient_mode == "grad":
            raise ValueError(
                f"{change}: with method={streaming.method!r} in dense mode the bases turn with "
                "every backward pass and each estimate has its rank alone, so other micro-batches "
                f"are another method, not only another order of sums; {back}"
            )
        if streaming.method == "power":
            raise ValueError(
                f"{change}: method='power' in factored mode is not linear in the gradient and "
                f"takes one micro-batch a step; {back}"
            )
    if micro_done * old % new:
        raise ValueError(
            f"{change}; it is of the middle of a step, with {micro_done * old} sequences done on "
            f"each device, which is no multiple of {new}: {back} or a divisor of it"
        )
    result = "the same up to rounding"
    if sampled:
        result = "the same on average: the sample is drawn per micro-batch"
    if masked:
        result += "; each micro-batch counts by the mean over its own targets, as before"
    return micro_done * old // new, f"device_batch_size was {old} and is {new}: steps are {result}"
