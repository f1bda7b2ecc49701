"""The flags of `molegrad.bench.memory`, and the variants that it measures."""

from __future__ import annotations

from dataclasses import dataclass

from molegrad.bench.memory_report import CHUNKS, DENSE, PLAIN, SIZES, TOKENS
from molegrad.bench.step import StepBenchConfig, settings
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import flag
from molegrad.lab.methods import METHODS, Method
from molegrad.memory.plan import RESERVE_GIB

ATTENTION = ("auto", "flash")


@dataclass(frozen=True)
class MemoryBenchConfig:
    """Measure peak memory against sequence length.

    Raises:
        ValueError: a size or length that cannot be measured; the message names it.
    """

    device: str = flag("cpu", "cpu or cuda")
    depth: int = flag(0, "transformer blocks; 0 takes 12 on CUDA, 4 elsewhere")
    aspect_ratio: int = flag(SIZES["aspect_ratio"], "width per block")
    vocab: int = flag(0, "entries of the vocabulary; 0 takes 32768 on CUDA, 2048 elsewhere")
    lengths: str = flag(
        "", "tokens of the one sequence, comma separated; empty takes 2048 to 65536 on CUDA, 256 "
        "to 1024 elsewhere",
    )  # fmt: skip
    variants: str = flag("", "variants to measure, comma separated; empty takes all")
    sequence_chunk: int = flag(0, "tokens in a chunk; 0 takes 4096 on CUDA, 128 elsewhere")
    dtype: str = flag("auto", "of the matrix products: auto, bfloat16 or float32")
    time_at: int = flag(
        0, "length at which steps are timed; 0 takes 8192 on CUDA, 512 elsewhere; -1 times none"
    )
    steps: int = flag(8, "steps of every variant that are timed")
    attention: str = flag(
        "", "auto: the kernel that torch chooses, as in training; flash: FlashAttention-2, which "
        "predictions are of; empty takes flash on CUDA in bfloat16, else auto",
    )  # fmt: skip
    cap_gib: float = flag(0.0, "GiB that the process may take of a GPU; 0 is no limit")
    predictions: str = flag("", "file of predictions to take instead of simulating")
    predict_only: bool = flag(False, "write that file and measure nothing; needs no GPU")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    seed: int = flag(0, "of weights and tokens")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
        gpu = self.device.startswith("cuda")
        defaults = {
            "depth": SIZES["depth"] if gpu else 4,
            "vocab": SIZES["vocab"] if gpu else 2048,
            "lengths": "2048,8192,16384,32768,65536" if gpu else "256,512,1024",
            "sequence_chunk": 4096 if gpu else 128,
            "time_at": TOKENS if gpu else 512,
            "variants": ",".join(variants_of(1)),
            "attention": "flash" if gpu and self.dtype != "float32" else "auto",
        }
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.cap_gib and not gpu:
            raise ValueError(f"cap_gib={self.cap_gib} limits a GPU's memory, got device=cpu")
        if self.cap_gib and self.cap_gib <= RESERVE_GIB:
            raise ValueError(
                f"cap_gib={self.cap_gib} leaves no model any room: {RESERVE_GIB} GiB are for the "
                "libraries and the allocator's gaps"
            )
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention} is not one of {', '.join(ATTENTION)}")
        if self.predict_only and not self.predictions:
            raise ValueError("predict_only=True writes to a file: name it by predictions=FILE")
        for name in ("depth", "aspect_ratio", "vocab", "steps", "sequence_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.length_list) < 2 or min(self.length_list) < 1:
            raise ValueError(f"lengths={self.lengths} needs two lengths or more, for a slope")
        unknown = [name for name in self.variant_list if name not in variants_of(1)]
        if unknown:
            known = ", ".join(variants_of(1))
            raise ValueError(f"variants={', '.join(unknown)} is not among {known}")

    @property
    def capped_variants(self) -> list[str]:
        """Those whose deepest model is looked for under the cap."""
        return list(dict.fromkeys((DENSE, self.variant_list[-1])))

    @property
    def length_list(self) -> list[int]:
        try:
            return sorted({int(part) for part in self.lengths.split(",")})
        except ValueError:
            raise ValueError(f"lengths={self.lengths} should look like 2048,8192") from None

    @property
    def variant_list(self) -> list[str]:
        """Dense first, to compare with."""
        named = [part.strip() for part in self.variants.split(",")]
        return [DENSE, *(name for name in named if name != DENSE)]

    @property
    def methods(self) -> dict[str, Method]:
        """The variants to measure."""
        every = variants_of(self.sequence_chunk)
        return {name: Method(name, every[name]) for name in self.variant_list}

    def step_config(self, depth: int = 0) -> StepBenchConfig:
        """The sizes, as `molegrad.bench.step` takes them."""
        return StepBenchConfig(
            device=self.device,
            depth=depth or self.depth,
            aspect_ratio=self.aspect_ratio,
            vocab=self.vocab,
            dtype=self.dtype,
            seed=self.seed,
        )

    def settings(self, name: str, tokens: int) -> BaseTrainConfig:
        """The resolved flags of base training of a variant, for one sequence of that length."""
        return settings(self.step_config(), self.methods[name], (1, tokens))


def variants_of(chunk: int) -> dict[str, dict]:
    """Name -> flags of base training."""
    block = {"recompute": "block"}
    chunks = {"sequence_chunk": chunk, "sequence_parts": "all"}
    balanced = METHODS["balanced"]
    return {
        DENSE: {},
        "dense + recompute": block,
        PLAIN: balanced,
        CHUNKS: {**balanced, **chunks},
        "MoleGrad + recompute": {**balanced, **block},
        f"{CHUNKS} + recompute": {**balanced, **chunks, **block},
        f"{CHUNKS} + recompute + offload": {**balanced, **chunks, **block, "offload": True},
    }
