"""Checkpoints: safetensors for tensors, JSON for everything else, whole or absent.

What: `Store.save` writes a step folder; `load` reads it back; `latest` finds the newest whole one;
`load_model` rebuilds the bare model for evaluation and chat, of earlier formats too.

    FOLDER/step_000100/
        model.safetensors       the weights under their state_dict names
        optimizer.safetensors   every tensor of the optimizers' states
        meta.json               step, configuration, sizes, the optimizers' other state; every
                                other file with its length and checksum
        rank_0.safetensors      bases, counters, random states of process 0 (rank_1 ... likewise)
        rank_0.json             its position in the data, the ranks of the converted layers

Why: no pickle, so that a checkpoint can be read anywhere and cannot run code. A folder is written
under another name, flushed to the disk and renamed (`molegrad.gpt.train.checkpoint_files`), so a
killed process or a full disk costs no earlier checkpoint; what is damaged later is found by its
checksum and left out. It holds everything that determines what comes next, in the middle of a step
too: a resumed CPU run repeats the uninterrupted one bit for bit (tests/gpt/train/test_resume.py).
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from molegrad import bases_state_dict, load_bases_state_dict
from molegrad.gpt import paths
from molegrad.gpt.model.gpt import GPT, GPTConfig
from molegrad.gpt.train import checkpoint_files as files
from molegrad.gpt.train.checkpoint_files import folders as step_folders
from molegrad.optim.rank import RankController, layer_ranks

FORMAT = 2  # 1: until the estimators' tensors and options had their present names
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass
class Record:
    """What a checkpoint holds beside weights, bases and optimizers.

    config: the resolved flags of the run. loader: the data loader's state_dict. ranks: of the
    layers, or the state of a RankController. extra: anything JSON-able (the loop's counters).
    accumulated: in the middle of a step, what its micro-batches have left so far
    (`molegrad.gpt.train.resume.accumulated_state`). loader, ranks and accumulated are each
    process's own.
    """

    config: dict = field(default_factory=dict)
    loader: dict = field(default_factory=dict)
    ranks: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    accumulated: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """What a step folder holds; the tensors are on the CPU. The fields of `Record` are its own
    too."""

    folder: Path
    step: int
    model_config: dict  # the arguments of GPTConfig
    model: dict[str, Tensor]
    optimizers: list[dict]
    bases: dict[str, Tensor]
    random: dict[str, Tensor]
    config: dict
    loader: dict
    ranks: dict
    extra: dict
    accumulated: dict[str, Tensor]


def stage_dir(run: str, stage: str, model_tag: str = "") -> Path:
    """Folder of one stage ("base", "sft") of a run: runs/RUN/STAGE, or runs/RUN/STAGE-TAG."""
    name = stage + (f"-{paths.check_run_name(model_tag)}" if model_tag else "")
    folder = paths.run_dir(run) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def latest(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. `say` is told which were left out, why."""
    for path in reversed(step_folders(folder)):
        problem = files.flaw(path)
        if not problem:
            return path
        say(f"left out {path}, which is not whole: {problem}")
    return None


def find(folder: Path, step: int = -1) -> Path:
    """The checkpoint of `step`, or the newest whole one for -1.

    Raises:
        FileNotFoundError: there is none; the message lists those that are there.
        ValueError: the checkpoint of `step` is not whole.
    """
    there = {files.step_of(p): p for p in step_folders(folder)}
    if step < 0 and (newest := latest(folder)):
        return newest
    if step in there:
        if problem := files.flaw(there[step]):
            raise ValueError(f"{there[step]} is not whole: {problem}; name another step")
        return there[step]
    have = f"steps {', '.join(map(str, there))}" if there else "no checkpoint"
    wanted = "a whole checkpoint" if step < 0 else f"a checkpoint of step {step}"
    raise FileNotFoundError(f"{folder} has {have}, not {wanted}: train first or name another step")


@dataclass(frozen=True)
class Store:
    """Where the checkpoints of a run go.

    folder: of the stage. config: of the run, in every checkpoint. keep_last: a save removes all but
    this many newest whole checkpoints up to its step; 0 keeps all. rank, world_size: this process
    among its like.
    """

    folder: Path
    config: dict = field(default_factory=dict)
    keep_last: int = 0
    rank: int = 0
    world_size: int = 1

    def save(self, step: int, model: GPT, optimizers=(), record: Record | None = None) -> Path:
        """Write FOLDER/step_NNNNNN and return it; every process must call this.

        Args:
            model: the bare GPT (not compiled, not wrapped).
            optimizers: their state_dicts are kept in this order.

        Raises:
            OSError: a process could not write its files (the disk is full, not writable). What was
                written of this checkpoint is removed; earlier ones are untouched.
        """
        record = record or Record()
        final = Path(self.folder) / f"step_{step:06d}"
        temporary = final.with_name(final.name + ".tmp")

        def clean() -> None:
            files.sweep(final.parent)
            temporary.mkdir(parents=True)

        def own_files() -> None:
            own = {"bases": bases_state_dict(model), "random": _random_states(model.device)}
            own |= {name: getattr(record, name) for name in ("loader", "ranks", "accumulated")}
            tensors: dict[str, Tensor] = {}
            tree = _flatten(own, tensors)
            _write_tensors(temporary / f"rank_{self.rank}.safetensors", tensors)
            _write_json(temporary / f"rank_{self.rank}.json", tree)
            if self.rank == 0:
                _write_tensors(temporary / "model.safetensors", model.state_dict())

        def shared_files() -> None:
            tensors: dict[str, Tensor] = {}
            tree = _flatten([optimizer.state_dict() for optimizer in optimizers], tensors)
            _write_tensors(temporary / "optimizer.safetensors", tensors)
            meta = {
                "format": FORMAT,
                "step": step,
                "world_size": self.world_size,
                "torch": torch.__version__,
                "model_config": asdict(model.config),
                "config": {**self.config, **record.config},
                "extra": record.extra,
                "files": files.manifest(temporary),
                "optimizers": tree,
            }
            _write_json(temporary / files.META, meta)
            files.put_in_place(temporary, final)
            if self.keep_last > 0:
                files.prune(final.parent, step, self.keep_last)

        first = self.rank == 0
        for part, takes_part in ((clean, first), (own_files, True), (shared_files, first)):
            error = None
            try:
                if takes_part:
                    part()
            except Exception as raised:
                error = raised
            if _any(error is not None, model.device, self.world_size):
                if first:
                    shutil.rmtree(temporary, ignore_errors=True)
                explained = _explained(error, final)
                raise explained from (None if explained is error else error)
        return final


def _any(here: bool, device: torch.device, world_size: int) -> bool:
    """Whether it is so in any process; none goes on before all have come here."""
    if world_size == 1:
        return here
    flag = torch.tensor(float(here), device=device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())


def _explained(error: Exception | None, final: Path) -> Exception:
    """An OSError that says what is left and what to do; other errors as they are."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := _OS_ERROR.search(str(error))):
        number = int(found.group(1))
    if error is not None and number is None:
        return error
    have = ", ".join(p.name for p in step_folders(final.parent)) or "none"
    full = number in (errno.ENOSPC, errno.EDQUOT)
    why = f"{os.strerror(number)}: " if number else "another process failed to write its part: "
    text = (
        f"{why}{final} was not saved{', the disk is full' if full else ''}. What was written of it "
        f"is removed; earlier checkpoints are untouched ({have}). Free some space, lower "
        "--keep-last or move MOLEGRAD_HOME to another disk, then go on with --resume"
    )
    return OSError(number, text) if number else OSError(text)


def load(folder: Path, rank: int = 0, world_size: int = 1) -> Checkpoint:
    """Read a step folder, to go on from it.

    Raises:
        FileNotFoundError: it is no complete checkpoint.
        ValueError: it was written by another format or another number of processes.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if meta["format"] != FORMAT:
        raise ValueError(
            f"{folder} was saved in format {meta['format']}, before estimators and their options "
            f"had their present names, and its training cannot be resumed (this version resumes "
            f"format {FORMAT}). Its weights still load, in evaluation, chat, export and "
            "fine-tuning; to go on training, use the version that wrote it, or start a run of "
            "another name"
        )
    if meta["world_size"] != world_size:
        raise ValueError(
            f"{folder} was written by {meta['world_size']} processes, this run has {world_size}: "
            "resume with the same number, or start a new run from its model.safetensors"
        )
    tree = json.loads((folder / f"rank_{rank}.json").read_text())
    return Checkpoint(
        folder=folder,
        model=load_file(folder / "model.safetensors"),
        optimizers=_unflatten(meta["optimizers"], load_file(folder / "optimizer.safetensors")),
        **{name: meta[name] for name in ("step", "config", "model_config", "extra")},
        **_unflatten(tree, load_file(folder / f"rank_{rank}.safetensors")),
    )


def read_meta(folder: Path) -> dict:
    """meta.json of a step folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of a later format.
    """
    path = Path(folder) / files.META
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no complete checkpoint: it has no meta.json")
    meta = json.loads(path.read_text(encoding="utf-8"))
    if meta.get("format") not in range(1, FORMAT + 1):
        raise ValueError(
            f"{path} has format {meta.get('format')}, this version reads up to {FORMAT}: "
            "use the version of molegrad that wrote it"
        )
    return meta


def weights_checksum(folder: Path, step: int) -> int | None:
    """CRC-32 of the weights that a stage has saved at `step`, as its list of files says."""
    files_of_step = read_meta(Path(folder) / f"step_{step:06d}").get("files", {})
    return files_of_step.get("model.safetensors", {}).get("crc32")


def restore(
    checkpoint: Checkpoint,
    model: GPT,
    optimizers=(),
    loader=None,
    ranks: RankController | None = None,
) -> None:
    """Put everything back: weights, ranks, bases, optimizers, data position, random states.

    `model` must be converted, and the optimizers made, as they were when it was saved; `ranks`, if
    given, gives the layers the ranks that they had come to.

    Raises:
        RuntimeError, ValueError: something does not fit; the message names it.
    """
    model.load_state_dict(checkpoint.model)
    if ranks is not None and "sums" in checkpoint.ranks:
        ranks.load_state_dict(checkpoint.ranks)
    _check_ranks(checkpoint, layer_ranks(model))
    load_bases_state_dict(model, checkpoint.bases)
    if len(optimizers) != len(checkpoint.optimizers):
        raise ValueError(
            f"the checkpoint holds {len(checkpoint.optimizers)} optimizers, this run has "
            f"{len(optimizers)}: resume with the same --optimizer"
        )
    for optimizer, state in zip(optimizers, checkpoint.optimizers, strict=True):
        optimizer.load_state_dict(_on_device(state, model.device))
    if loader is not None:
        loader.load_state_dict(checkpoint.loader)
    _set_random_states(checkpoint.random, model.device)


def _check_ranks(checkpoint: Checkpoint, now: dict[str, int]) -> None:
    saved = checkpoint.ranks.get("ranks", {})
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            adaptive = "sums" in checkpoint.ranks
            flag = "energy_target" if adaptive else "rank_k and --streaming_rank_overrides"
            raise ValueError(
                f"{checkpoint.folder} was saved with rank {saved[name]} of {name}, this run has "
                f"{now[name]}: resume with the same --streaming_{flag}"
            )


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[GPT, dict]:
    """The bare model of a step folder in eval mode on `device`, and meta.json."""
    meta = read_meta(folder)
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]))
    model.to_empty(device="cpu")
    model.reset_buffers()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model.to(device).eval(), meta


def _flatten(value, tensors: dict[str, Tensor], path: str = ""):
    """`value` with every tensor replaced by a reference; the tensors are put into `tensors`.

    Keys that are no strings, and tuples, are marked, so that `_unflatten` gives them back.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"$tensor": path, "device": value.device.type}
    if isinstance(value, dict):
        items = [[k, _flatten(v, tensors, f"{path}/{k}")] for k, v in value.items()]
        return {"$dict": items}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unflatten(tree, tensors: dict[str, Tensor]):
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        tensor = tensors[tree["$tensor"]]
        tensor.saved_on = tree["device"]
        return tensor
    if "$tuple" in tree:
        return tuple(_unflatten(item, tensors) for item in tree["$tuple"])
    return {key: _unflatten(item, tensors) for key, item in tree["$dict"]}


def _on_device(value, device: torch.device):
    """Optimizer state where it was: tensors saved from an accelerator go to `device`. (torch's
    load_state_dict leaves step counters where they are given.)"""
    if isinstance(value, Tensor):
        return value if getattr(value, "saved_on", "cpu") == "cpu" else value.to(device)
    if isinstance(value, dict):
        return {key: _on_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_device(item, device) for item in value]
    return value


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Copies are written: safetensors takes no views, and two names may share one tensor."""
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    save_file(copies, path)
    files.sync_file(path)


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    files.sync_file(path)
