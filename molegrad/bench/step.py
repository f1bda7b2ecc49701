"""Time and memory of whole training steps: dense Muon against MoleGrad, the same code otherwise.

    python -m scripts.bench_step --device=cpu --depth=4 --aspect-ratio=32 --batches=8x256 --json
    python -m scripts.bench_step --device=cuda --depth=12 --batches=1x8192,16x2048 --compile=both

A method is a name of `molegrad.lab.methods`, overrides behind colons included, such as
balanced:sequence_chunk=1024:sequence_parts=all. For every batch (sequences x tokens of one
micro-batch, a step each) and every method, first its memory is measured with nothing else there:
gradients, optimizer state and saved layer inputs as tensors that exist, and on a GPU the peak of
three steps. Then its steps are timed in turn with dense's, step by step, in the same process; a
ratio is the median of the pairs' own ratios, with an interval that holds it with 95% confidence.

Phases: forward (the loss included), backward, optimizer (zero_grad included), total. Times are the
host's on the CPU, the device's between events on a GPU, which is waited for once a step. What fails
or does not fit beside dense has a note that says why, and the rest goes on; Ctrl-C ends with what
has been measured.

Precision of float32 products and the kernel of attention are those of base training, torch's own
choice; the result says which kernel that is.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from molegrad import build_info
from molegrad.bench.timing import exit_status, no_room, until_interrupted
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import flags, setup
from molegrad.gpt.train.config import BaseTrainConfig, compute_dtype, resolve
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import attention_backend, device_name, peak_memory_bytes
from molegrad.lab.methods import Method, parse_methods
from molegrad.lab.table import median_interval
from molegrad.memory.table import table
from molegrad.monitor import PhaseTimer, memory_bytes, saved_bytes

PHASES = ("forward", "backward", "optimizer")
WARM_UP = 3


@dataclass(frozen=True)
class StepBenchConfig:
    """Time training steps, and count what they hold.

    Raises:
        ValueError: a batch, size or method that cannot be timed; the message names it.
    """

    device: str = flag("cpu", "cpu or cuda")
    depth: int = flag(4, "transformer blocks")
    aspect_ratio: int = flag(64, "width per block")
    vocab: int = flag(32768, "entries of the vocabulary")
    batches: str = flag("4x512", "sequences x tokens of a step, comma separated")
    methods: str = flag("exact,balanced,minimal,tangent", "methods, as scripts.compare takes them")
    dtype: str = flag("auto", "of the matrix products: auto, bfloat16 or float32")
    compile: str = flag("no", "torch.compile: no, yes or both")
    steps: int = flag(20, "steps of every method that count")
    threads: int = flag(0, "CPU threads; 0 leaves torch's own number")
    seed: int = flag(0, "of weights and tokens")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: bool = flag(False, "print the tables as Markdown")

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype} is not one of auto, bfloat16, float32")
        if self.compile not in ("no", "yes", "both"):
            raise ValueError(f"compile={self.compile} is not one of no, yes, both")
        for name in ("depth", "aspect_ratio", "vocab", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(min(batch) for batch in self.batch_list) < 1:
            raise ValueError(f"batches={self.batches} needs at least one sequence and token")

    @property
    def batch_list(self) -> list[tuple[int, int]]:
        try:
            pairs = [tuple(int(x) for x in part.split("x")) for part in self.batches.split(",")]
            return [(rows, tokens) for rows, tokens in pairs]
        except ValueError:
            raise ValueError(f"batches={self.batches} should look like 1x8192,16x2048") from None


def settings(
    config: StepBenchConfig, method: Method, batch: tuple[int, int], compiled: bool = False
) -> BaseTrainConfig:
    """The resolved flags of base training that `Training` has."""
    rows, tokens = batch
    values = {
        "depth": config.depth,
        "aspect_ratio": config.aspect_ratio,
        "max_seq_len": tokens,
        "device_batch_size": rows,
        "total_batch_size": rows * tokens,
        "device_type": config.device,
        "compile": compiled,
        "seed": config.seed,
        "num_iterations": 1,
        "dtype": config.dtype,
        **method.flags,
    }
    return resolve(flags.make(BaseTrainConfig, **values), torch.device(config.device))


class Training:
    """One method's model and optimizers, and the seconds of its steps by phase.

    Args:
        batch: (sequences, tokens). compiled: forward and backward pass through torch.compile.
    """

    def __init__(
        self, config: StepBenchConfig, method: Method, batch: tuple[int, int], compiled: bool
    ) -> None:
        rows, tokens = batch
        device = torch.device(config.device)
        self.config = settings(config, method, batch, compiled)
        sizes = GPTConfig(
            config.depth, config.aspect_ratio, vocab_size=config.vocab, max_seq_len=tokens
        )
        model = GPT.made_on(device, sizes, config.seed)
        self.model = setup.place(model, self.config, device)
        setup.equip(self.model, self.config)
        self.optimizers = setup.build_optimizers(self.model, self.config)
        self.called = setup.wrap(self.model, self.config, setup.Processes())
        generator = torch.Generator().manual_seed(config.seed)
        text = torch.randint(config.vocab, (rows, tokens + 1), generator=generator).to(device)
        self.inputs, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.timer = PhaseTimer(device)
        self.seconds: list[dict[str, float]] = []

    def loss(self) -> torch.Tensor:
        dtype = compute_dtype(self.config)
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            return self.called(self.inputs, self.targets)

    def step(self) -> float:
        """One training step; its seconds, which are kept by phase too."""
        with self.timer("forward"):
            loss = self.loss()
        with self.timer("backward"):
            loss.backward()
        with self.timer("optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        self.timer.step()
        times = self.timer.read()
        phases = {phase: times[f"time/{phase}_ms"] / 1e3 for phase in PHASES}
        self.seconds.append(phases)
        return sum(phases.values())

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind, and on a GPU the peak of three steps."""
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            self.step()
        self.seconds.clear()
        peak = {"peak": peak_memory_bytes(device)} if device.type == "cuda" else {}
        blocks = self.model.transformer["h"]
        held = memory_bytes(blocks, self.optimizers)
        layers = [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
        compiled, self.called = self.called, self.model  # hooks see eager calls only
        saved = saved_bytes(layers, self.loss)
        self.called = compiled
        state = held["optimizer_state"] + held["bases"]
        return {"gradients": held["gradients"], "state": state, "inputs": saved, **peak}


@contextlib.contextmanager
def prepared(config) -> Iterator[torch.device]:
    """The device of a benchmark; inside, settings of the process are those of base training.

    Args:
        config: with `device` and `threads`.

    Raises:
        ValueError: a device that is not there.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use --device=cpu")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    setup.prepare_device(config, device)
    try:
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def attention_taken(config: StepBenchConfig) -> str:
    """The kernel of attention, as `attention_backend` names it, with the present settings."""
    device = torch.device(config.device)
    dtype = compute_dtype(settings(config, parse_methods("dense")[0], (1, 1)))
    sizes = GPTConfig(config.depth, config.aspect_ratio)
    return attention_backend(device, dtype, sizes.n_head, sizes.head_dim)


def tried(function: Callable, *args) -> tuple:
    """(what the function gives, {}), or (None, a note why it failed), with "failed" where that was
    not for want of memory."""
    try:
        return function(*args), {}
    except Exception as error:
        if no_room(error):
            return None, {"note": "out of memory"}
        traceback.print_exc(file=sys.stderr)
        reason = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {reason[0] if reason else ''}"
        return None, {"note": note, "failed": True}


def alone(function: Callable, *args) -> tuple:
    """As `tried`; what the function built is given back after it."""
    answer = tried(function, *args)
    clean()  # now, as the error held on to what was there
    return answer


def clean() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of a device that an earlier error has broken
            torch.cuda.empty_cache()


def bench_batch(
    config: StepBenchConfig,
    methods: list[Method],
    batch: tuple[int, int],
    compiled: bool,
    rows: list[dict],
) -> None:
    """Add a row for every method, dense first, to `rows`; where it is interrupted, those with what
    is known."""
    dense = methods[0]
    common = {"sequences": batch[0], "tokens": batch[1], "compiled": compiled}
    found: dict[str, dict] = {}
    try:
        for method in methods:
            row = found[method.label] = {**common, "method": method.label}
            held, why = alone(_memory, config, method, batch, compiled)
            row |= why or {f"{key}_mib": value / 2**20 for key, value in held.items()}
            if "peak_mib" in row and "peak_mib" in found[dense.label]:
                row["peak_ratio"] = row["peak_mib"] / found[dense.label]["peak_mib"]
        for method in methods[1:] or methods:
            row, reference = found[method.label], found[dense.label]
            if "note" in row or "note" in reference:
                row.setdefault("note", f"not timed, as dense failed: {reference.get('note')}")
                continue
            timed, why = alone(_time, config, dense, method, batch, compiled)
            row |= why or (_times(*timed) if method is not dense else {})
            if timed and "ratio" not in reference:
                reference |= _times(timed[1], timed[1])
    finally:
        rows.extend(found.values())


def _memory(config, method: Method, batch, compiled: bool) -> dict[str, int]:
    try:
        return Training(config, method, batch, compiled).memory()
    finally:
        torch.compiler.reset()


def _time(config, dense: Method, method: Method, batch, compiled: bool):
    """Seconds by phase of the method's steps and of dense's, made in turn."""
    try:
        reference = Training(config, dense, batch, compiled)
        own = reference if method is dense else Training(config, method, batch, compiled)
        for number in range(WARM_UP + config.steps):
            pair = (reference,) if own is reference else (own, reference)
            for training in pair[::-1] if number % 2 else pair:
                training.step()
        return own.seconds[WARM_UP:], reference.seconds[WARM_UP:]
    finally:
        torch.compiler.reset()


def _times(seconds, reference) -> dict:
    """What a row says of seconds by phase, and of their ratios to the reference's."""
    totals = [sum(phases.values()) for phases in seconds]
    others = [sum(phases.values()) for phases in reference]
    ratios = [own / other for own, other in zip(totals, others, strict=True)]
    low, high = median_interval(ratios)
    return {
        "ms": 1e3 * statistics.median(totals),
        **{f"{p}_ms": 1e3 * statistics.median(phases[p] for phases in seconds) for p in PHASES},
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def bench(config: StepBenchConfig) -> dict:
    """Every measurement of a configuration, and on what machine; after Ctrl-C what there is, with
    "interrupted".

    Raises:
        ValueError: an unknown method, or a device that is not there.
    """
    methods = parse_methods(config.methods)
    peers = [method.label for method in methods if method.peer is not None]
    if peers:
        raise ValueError(f"methods={', '.join(peers)}: peers are timed by scripts.compare")
    rows: list[dict] = []
    with prepared(config) as device:
        result = {
            "rows": rows,
            "device": device_name(device),
            "attention": attention_taken(config),
            "config": flags.resolved(config),
            "build_info": build_info(),
        }
        with until_interrupted(result):
            for batch in config.batch_list:
                for compiled in _COMPILED[config.compile]:
                    bench_batch(config, methods, batch, compiled, rows)
    return result


_COMPILED = {"no": (False,), "yes": (True,), "both": (False, True)}
_COLUMNS = {  # heading: (key, format)
    "batch": ("batch", "s"), "compiled": ("compiled", "s"), "method": ("method", "s"),
    "ms a step": ("ms", ".1f"), "forward": ("forward_ms", ".1f"),
    "backward": ("backward_ms", ".1f"), "optimizer": ("optimizer_ms", ".1f"),
    "/ dense": ("shown", "s"), "gradients MiB": ("gradients_mib", ".1f"),
    "state MiB": ("state_mib", ".1f"), "layer inputs MiB": ("inputs_mib", ".1f"),
    "peak MiB": ("peak_mib", ".0f"), "peak / dense": ("peak_ratio", ".2f"),
    "note": ("note", "s"),
}  # fmt: skip


def shown(rows: list[dict], markdown: bool = False) -> str:
    """The rows of `bench` as aligned text or as Markdown."""
    if not rows:
        return "no rows"
    return table([_shown(row) for row in rows], _COLUMNS, markdown)


def _shown(row: dict) -> dict:
    shown = {
        **row,
        "batch": f"{row['sequences']}x{row['tokens']}",
        "compiled": "yes" if row["compiled"] else "no",
    }
    if "ratio" in row:
        shown["shown"] = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
    return shown


@flags.command("bench_step")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(StepBenchConfig, argv, prog="python -m scripts.bench_step")
    try:
        result = bench(config)
    except ValueError as error:
        print(f"bench_step: {error}")
        return 2
    sizes = f"depth {config.depth}, width {config.depth * config.aspect_ratio}"
    versions = f"torch {result['build_info']['torch']}"
    kernels = f"attention {result['attention']}"
    print(f"{result['device']}, {versions}, {sizes}, vocabulary {config.vocab}, {kernels}\n")
    print(shown(result["rows"], config.markdown))
    if result.get("interrupted"):
        print("\ninterrupted: the rows so far")
    if config.json:
        print(json.dumps(result), flush=True)
    return exit_status(result, failed=any(row.get("failed") for row in result["rows"]))
