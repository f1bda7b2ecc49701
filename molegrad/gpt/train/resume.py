"""Going on from a checkpoint: what a step that was begun has left, and what may differ from before.

What: `check_same_run` says whether a checkpoint is of the same model, tokenizer and method,
`check_batches` whether the sizes of batches fit; `accumulated_state` and `load_accumulated` keep
and put back the work of the micro-batches of an unfinished step.

A step is made of micro-batches of --device-batch-size sequences, and the loader's sequences come in
the same order whatever that is. With the same --total-batch-size, another --device-batch-size
therefore cuts the same step at other places, and what follows depends on the estimate:

    no MoleGrad, tangent in factors   the same up to rounding: sums over tokens
    exact, sampled                    other draws of the same unbiased estimate; an int8 momentum
                                      rounds at other places
    tangent or power in weight.grad   refused: bases turn, and an estimate is cut to its rank, with
                                      every backward pass; other passes are another method

In fine-tuning a micro-batch's loss is the mean over its own targets, so the weight of a
conversation among others moves a little as well.
"""

import torch
from torch import Tensor, nn

from molegrad import MoleGradConfig, MoleLinear
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model.gpt import GPT
from molegrad.gpt.train.checkpoint import Checkpoint
from molegrad.gpt.train.setup import BatchSizes


def check_same_run(saved: Checkpoint, model: GPT, tokenizer: Tokenizer, flags: dict) -> None:
    """ValueError where a checkpoint is of a model of other sizes, of another tokenizer, or of a run
    that made its gradients in another way.

    Args:
        flags: resolved, by name.
    """
    now, before = vars(model.config), saved.model_config
    differ = [
        f"{name}={before[name]} (now {now[name]})"
        for name in now
        if name != "loss_chunk" and before.get(name) != now[name]
    ]
    if not differ:
        names = ("enable_streaming", "streaming_method", "streaming_gradient_mode", "head_rank")
        pairs = {name: (saved.config.get(name), flags.get(name)) for name in names}
        differ = [f"{n}={old} (now {new})" for n, (old, new) in pairs.items() if old != new]
    if differ:
        raise ValueError(
            f"{saved.folder} was saved with {', '.join(differ)}: resume with the same flags"
        )
    if saved.config.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(
            f"{saved.folder} was trained with another tokenizer than this run's; a copy of its own "
            f"is in {saved.folder.parent / 'tokenizer'}"
        )


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
        f"{name}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, MoleLinear)
        for key, tensor in layer.state.tensors.items()
        if key in ("momentum", "momentum_scale")
    }


def check_batches(
    saved: Checkpoint,
    sizes: BatchSizes,
    streaming: MoleGradConfig | None,
    masked: bool = False,
    micro_done: int = 0,
) -> tuple[int, str]:
    """Whether a run with batches of `sizes` may go on from `saved`.

    Args:
        streaming: how gradients are estimated, or None.
        masked: some targets do not count, as in fine-tuning.
        micro_done: micro-batches of the unfinished step, as the checkpoint counts them.

    Returns:
        the same count in micro-batches of `sizes`, and a note for people, "" where all is equal.

    Raises:
        ValueError: a step would be another one; the message says what to do.
    """
    before, now = saved.extra["batches"], sizes.record()
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
    unbiased = streaming is not None and streaming.estimator.unbiased
    if streaming is not None and not unbiased and streaming.gradient_mode == "grad":
        raise ValueError(
            f"{change}: with method={streaming.method!r} in weight.grad the bases turn with every "
            "backward pass and each estimate has its rank alone, so other micro-batches are "
            f"another method, not only another order of sums; {back}"
        )
    if micro_done * old % new:
        raise ValueError(
            f"{change}; it is of the middle of a step, with {micro_done * old} sequences done on "
            f"each device, which is no multiple of {new}: {back} or a divisor of it"
        )
    result = "the same up to rounding"
    if unbiased:
        result = "the same on average: what is drawn at random is drawn per micro-batch"
    if masked:
        result += "; each micro-batch counts by the mean over its own targets, as before"
    return micro_done * old // new, f"device_batch_size was {old} and is {new}: steps are {result}"
