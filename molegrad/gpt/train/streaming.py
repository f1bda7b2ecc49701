"""The flags of the estimators, and the method that a step of training needs.

`--enable_streaming=True` alone is block power of rank 32 in the feed-forward layers, its gradient
kept as factors. `--streaming_preset=NAME` stands for it and the fields of that preset; flags given
beside it win.
"""

from dataclasses import replace
from typing import Literal

from molegrad.config import PRESETS, MoleGradConfig
from molegrad.estimators import methods
from molegrad.gpt.train.flags import PREFIX, Flag, Group, fields_as_flags

AS_GIVEN = "as given"
_RENAMED_MODES = {"dense": "grad", "factored": "factors"}


class Streaming(Group):
    """`--enable_streaming`, `--streaming_preset`, `--streaming_method` and a `--streaming_<field>`
    for each field of `MoleGradConfig` and of every estimator: the field `streaming`."""

    renamed = {
        "streaming_sample_share": "streaming_sampling_fraction",
        "streaming_sample_overrides": "streaming_sampling_overrides",
        "streaming_sample_block": "streaming_sampling_block",
        "streaming_project_stride": "",
    }

    def flags(self) -> list[Flag]:
        found = [
            Flag(
                "enable_streaming",
                bool,
                False,
                "estimated weight gradients (MoleGrad) in the target layers",
            ),
            Flag(
                PREFIX + "preset",
                Literal[tuple(PRESETS)],
                "",
                "a named configuration, which switches streaming on",
            ),
            Flag(
                PREFIX + "method",
                Literal[tuple(methods())],
                "",
                "estimator: 'power' (rank k, two dependent passes, for steps of one micro-batch on "
                "one process), 'tangent' (rank 2k, one pass, a sum over tokens), 'exact' or "
                "'sampled' (unbiased, of full rank); without it power, or tangent where the "
                "step needs sums",
            ),
        ]
        names = {entry.name for entry in found}
        kinds = [MoleGradConfig, *(kind for kind, _ in methods().values())]
        for entry in (e for kind in kinds for e in fields_as_flags(kind, PREFIX)):
            if entry.name not in names | {PREFIX + "estimator"}:
                found.append(entry)
                names.add(entry.name)
        return found

    def build(self, given: dict) -> dict:
        given = {k: v for k, v in given.items() if k != PREFIX + "preset" or v}
        own = {k.removeprefix(PREFIX): v for k, v in given.items() if k != "enable_streaming"}
        preset = own.pop("preset", None)
        if not given.get("enable_streaming", preset is not None):
            own.pop("seed", None)  # which runs that are to be compared share
            if preset is not None:
                raise ValueError(
                    f"streaming_preset={preset} and enable_streaming=False: drop one of them"
                )
            if own:
                words = [f"{PREFIX}{name}={value!r}" for name, value in own.items()]
                raise ValueError(
                    f"{', '.join(words)} {'has' if len(own) == 1 else 'have'} no effect without "
                    "--enable_streaming=True (or a --streaming_preset)"
                )
            return {"streaming": None}
        mode = own.get("gradient_mode")
        if mode in _RENAMED_MODES:
            raise ValueError(
                f"streaming_gradient_mode={mode!r} is now called {_RENAMED_MODES[mode]!r}"
            )
        kind, _ = methods().get(own.get("method", "power"), (None, {}))
        if preset is None and mode is None and kind is not None and "factors" in kind.MODES:
            own["gradient_mode"] = "factors"
        try:
            config = MoleGradConfig.preset(preset, **own) if preset else MoleGradConfig.of(**own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}{_stands_for(preset, own)}") from None
        named = own.get("method") or PRESETS[preset or "lowrank"].get("method")
        return {"streaming": config, "method_because": "" if named is None else AS_GIVEN}

    def values(self, config) -> dict:
        if config.streaming is None:
            return {"enable_streaming": False}
        flat = {PREFIX + name: value for name, value in config.streaming.flat().items()}
        if not config.method_because:
            del flat[PREFIX + "method"]
        return {"enable_streaming": True, **flat}


def _stands_for(preset: str | None, given: dict) -> str:
    if preset is None:
        return ""
    flags = {k: v for k, v in PRESETS[preset].items() if k not in given}
    words = [
        f"--{PREFIX}{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in flags.items()
    ]
    return f"\n--streaming_preset={preset} stands for {' '.join(words)}: a value beside it wins"


def with_method(config, world_size: int = 1):
    """`config`, its batch sizes resolved, with the low-rank method that its steps need: block power
    where one backward pass makes the gradient of a step, tangent where the step is a sum.

    Raises:
        ValueError: block power was asked for, and the step is a sum of factors.
    """
    streaming, rows = config.streaming, config.device_batch_size
    if streaming is None or streaming.estimator.adds_up:
        return replace(config, method_because=config.method_because or AS_GIVEN)
    micro = rows * config.max_seq_len
    count = config.total_batch_size // (micro * world_size)
    sums = []
    if config.factors and count > 1:
        sums.append(f"{count} micro-batches a step")
    if config.factors and world_size > 1:
        sums.append(f"{world_size} processes")
    if config.method_because and sums:
        raise ValueError(
            f"streaming_method={streaming.method} with streaming_gradient_mode=factors takes one "
            f"micro-batch a step on one process, got {' and '.join(sums)}: take "
            "streaming_method=tangent, whose estimates add up, or on one process "
            f"device_batch_size={config.total_batch_size // config.max_seq_len} or "
            f"total_batch_size={micro}"
        )
    if config.method_because:  # chunks are refused where the layers are known
        return config
    attention_alone = streaming.target_layers == "attention_only"
    if config.sequence_chunk and not (config.sequence_parts == "mlp" and attention_alone):
        sums.append(f"chunks of {config.sequence_chunk} tokens")
    if not sums:
        return replace(config, method_because="a step is one micro-batch of one process")
    because = f"a step needs sums over {' and '.join(sums)}"
    return replace(config, streaming=streaming.changed(method="tangent"), method_because=because)
