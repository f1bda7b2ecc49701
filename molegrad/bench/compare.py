"""Dense against low-rank training: same model, same tokens, same seeds, each method's own best
learning rate.

    python -m scripts.compare --json
    python -m scripts.compare --depth=4 --num-iterations=500 --methods=dense,factored-tangent

Every method is first trained with the first seed at every learning rate of --matrix-lrs; the best
one is then trained with the other seeds. Dense Muon is tuned like the others. What has been trained
is kept in $MOLEGRAD_HOME/report/compare.jsonl, one line a run, so that an interrupted or extended
comparison only trains what is missing.

The table gives held-out bits per byte (mean over the seeds and their spread), the gap to dense, the
time of a step (median, and its ratio to dense; runs are made one after the other on one machine)
and the bytes of weight gradients and of optimizer state, counted on the tensors that exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from molegrad import build_info
from molegrad.gpt import flags, paths
from molegrad.gpt.flags import flag
from molegrad.gpt.logger import read_metrics
from molegrad.gpt.train import base_train
from molegrad.gpt.train_config import BaseTrainConfig

METHODS: dict[str, dict] = {
    "dense": {"enable_streaming": False},
    **{
        f"{mode}-{method}": {
            "enable_streaming": True,
            "streaming_gradient_mode": mode,
            "streaming_method": method,
        }
        for mode in ("dense", "factored")
        for method in ("power", "tangent")
    },
}
LEFT_OUT_STEPS = 5  # of the step time: warm-up


@dataclass(frozen=True)
class CompareConfig:
    """Compare dense training with low-rank gradients at equal tokens.

    Raises:
        ValueError: an unknown method, no seed or no learning rate.
    """

    methods: str = flag(",".join(METHODS), "methods, comma separated; 'dense' is always there")
    seeds: int = flag(2, "number of seeds: 0, 1, ...")
    matrix_lrs: str = flag("0.01,0.02,0.04", "learning rates to choose from for every method")
    depth: int = flag(3, "number of transformer blocks")
    aspect_ratio: int = flag(64, "width per block")
    max_seq_len: int = flag(256, "tokens per sequence")
    device_batch_size: int = flag(8, "sequences per micro-batch")
    total_batch_size: int = flag(0, "tokens per step; 0 is one micro-batch")
    num_iterations: int = flag(300, "steps of every run")
    streaming_rank_k: int = flag(32, "rank of the low-rank methods")
    streaming_target_layers: str = flag("ffn_only", "layers the low-rank methods convert")
    streaming_warm_start_decay: float = flag(0.95, "share of the basis kept per step")
    data: str = flag("embedded", "corpus, as base_train takes it")
    eval_tokens: int = flag(131072, "tokens of the held-out evaluation")
    device_type: str = flag("", "cuda, cpu or mps; empty takes the best there is")
    threads: int = flag(0, "CPU threads of torch; 0 leaves torch's choice")
    json: bool = flag(False, "print one JSON object as the last line")
    markdown: str = flag("", "also write the table to this file")

    def __post_init__(self) -> None:
        unknown = [name for name in self.method_names if name not in METHODS]
        if unknown:
            raise ValueError(f"unknown methods {unknown}: choose among {', '.join(METHODS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"matrix_lrs must be positive numbers, got {self.matrix_lrs!r}")

    @property
    def method_names(self) -> list[str]:
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        return ["dense", *(name for name in names if name != "dense")]

    @property
    def learning_rates(self) -> list[float]:
        return [float(x) for x in self.matrix_lrs.split(",") if x.strip()]


def training_config(config: CompareConfig, method: str, lr: float, seed: int) -> BaseTrainConfig:
    """The flags of one run of the comparison."""
    low_rank = {
        "streaming_rank_k": config.streaming_rank_k,
        "streaming_target_layers": config.streaming_target_layers,
        "streaming_warm_start_decay": config.streaming_warm_start_decay,
        "streaming_seed": seed,
    }
    return BaseTrainConfig(
        run=f"compare-{method}",
        depth=config.depth,
        aspect_ratio=config.aspect_ratio,
        max_seq_len=config.max_seq_len,
        device_batch_size=config.device_batch_size,
        total_batch_size=config.total_batch_size,
        num_iterations=config.num_iterations,
        matrix_lr=lr,
        seed=seed,
        data=config.data,
        device_type=config.device_type,
        threads=config.threads,
        eval_every=0,
        eval_tokens=config.eval_tokens,
        sample_every=-1,
        keep_last=1,
        wandb=False,
        overwrite=True,
        **METHODS[method],
        **(low_rank if METHODS[method]["enable_streaming"] else {}),
    )


def run_once(config: BaseTrainConfig) -> dict:
    """Train; what the comparison keeps of a run."""
    log = paths.run_dir(config.run) / "compare.log"
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        result = base_train(config)
    if result["interrupted"]:
        raise KeyboardInterrupt("a signal ended the run: the comparison can be started again")
    times = [
        record["train/dt"]
        for record in read_metrics(Path(result["folder"]))
        if "train/dt" in record and record["step"] > LEFT_OUT_STEPS
    ]
    return {
        "bpb": result["val/bpb"],
        "train_loss": result["train/loss"],
        "step_ms": 1e3 * statistics.median(times) if times else None,
        "gradient_bytes": result["memory/gradients"],
        "state_bytes": result["memory/optimizer_state"] + result["memory/bases"],
        "tokens": result["train/tokens"],
    }


def read_jsonl(path: Path) -> list[dict]:
    """The records of a file of JSON lines; [] where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def key_of(config: BaseTrainConfig) -> str:
    """What makes two runs the same: all flags, and whether the native kernels ran."""
    identity = {**flags.resolved(config), "native": build_info()["native"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def compare(
    config: CompareConfig,
    run: Callable[[BaseTrainConfig], dict] = run_once,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """One row per method; runs what $MOLEGRAD_HOME/report/compare.jsonl does not hold already."""
    store = paths.report_dir() / "compare.jsonl"
    known = {record["key"]: record for record in read_jsonl(store)}

    def trained(method: str, lr: float, seed: int) -> dict:
        settings = training_config(config, method, lr, seed)
        key = key_of(settings)
        if key not in known:
            say(f"training {method}, learning rate {lr:g}, seed {seed}")
            record = {"key": key, "method": method, "lr": lr, "seed": seed, **run(settings)}
            record["config"] = flags.resolved(settings)
            with open(store, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            known[key] = record
        record = known[key]
        say(f"  {method}: lr {lr:g}, seed {seed}: {record['bpb']:.4f} bits per byte")
        return record

    rows = []
    for method in config.method_names:
        sweep = [trained(method, lr, 0) for lr in config.learning_rates]
        best = min(sweep, key=lambda record: record["bpb"])
        runs = [best, *(trained(method, best["lr"], seed) for seed in range(1, config.seeds))]
        rows.append(summary(method, runs, sweep))
    dense = rows[0]
    for row in rows:
        row["gap_percent"] = 100 * (row["bpb"] / dense["bpb"] - 1)
        row["step_ratio"] = row["step_ms"] / dense["step_ms"]
        row["gradient_ratio"] = dense["gradient_bytes"] / row["gradient_bytes"]
        row["state_ratio"] = dense["state_bytes"] / row["state_bytes"]
    return rows


def summary(method: str, runs: list[dict], sweep: list[dict]) -> dict:
    """The row of a method from its runs at its best learning rate."""
    bpbs = [run["bpb"] for run in runs]
    edge = runs[0]["lr"] in (sweep[0]["lr"], sweep[-1]["lr"]) and len(sweep) > 1
    return {
        "method": method,
        "lr": runs[0]["lr"],
        "lr_at_edge_of_sweep": edge,
        "sweep": {f"{run['lr']:g}": run["bpb"] for run in sweep},
        "bpb": statistics.fmean(bpbs),
        "bpb_spread": max(bpbs) - min(bpbs),
        "seeds": len(runs),
        "step_ms": statistics.median(run["step_ms"] for run in runs),
        "gradient_bytes": runs[0]["gradient_bytes"],
        "state_bytes": runs[0]["state_bytes"],
        "tokens": runs[0]["tokens"],
    }


def table(rows: Iterable[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | learning rate | bits per byte | spread | gap to dense | ms a step "
        "| step / dense | gradients MiB | dense / gradients | optimizer + bases MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        edge = " (edge)" if row["lr_at_edge_of_sweep"] else ""
        lines.append(
            f"| {row['method']} | {row['lr']:g}{edge} | {row['bpb']:.4f} | {row['bpb_spread']:.4f} "
            f"| {row['gap_percent']:+.2f}% | {row['step_ms']:.0f} | {row['step_ratio']:.2f} "
            f"| {row['gradient_bytes'] / 2**20:.2f} | {row['gradient_ratio']:.2f}x "
            f"| {row['state_bytes'] / 2**20:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    config = flags.parse(CompareConfig, argv, prog="python -m scripts.compare")
    rows = compare(config, say=lambda text: print(text, flush=True))
    text = table(rows)
    print(f"\n{text}")
    if config.markdown:
        Path(config.markdown).write_text(text + "\n", encoding="utf-8")
    if config.json:
        print(json.dumps({"config": flags.resolved(config), "build": build_info(), "rows": rows}))
    return 0
