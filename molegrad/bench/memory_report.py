"""What `molegrad.bench.memory` has measured, as tables, and against what is wanted of a GPU."""

from __future__ import annotations

from molegrad.bench import targets
from molegrad.bench.table import table
from molegrad.bench.targets import Target

MIB = 2**20
DENSE, PLAIN, CHUNKS = "dense", "MoleGrad", "MoleGrad + chunks"  # names of variants
# Sizes and numbers that are wanted.
DEPTH, TOKENS, LONG = 12, 8192, 65536
SIZES = {"depth": DEPTH, "aspect_ratio": 64, "vocab": 32768}
PEAK_SHARE, SLOPE_SHARE, TIME_RATIO, TOLERANCE = 0.5, 0.1, 1.25, 0.10


def memory_targets(result: dict) -> list[dict]:
    """A row for every target, as `molegrad.bench.targets` has them. What was measured on another
    device than a GPU, or with other sizes, is a note."""
    config, rows = result["config"], result["peaks"]
    sized = all(config[name] == size for name, size in SIZES.items())
    official = config["device"].startswith("cuda") and sized
    where = f"{config['device']}, depth {config['depth']}, {{}} tokens"

    def target(name: str, wanted: float, spec: str, tokens, value, variant="", more=False):
        """`value` counts at the length that is wanted alone."""
        note = variant
        counts = official and tokens in (None, TOKENS)
        if value is not None and not counts:
            at = where.format("all" if tokens is None else tokens)
            note = f"{variant + ', ' if variant else ''}{at}: {value:{spec}}"
        return Target(name, wanted, value if counts else None, spec, more, note).row()

    longest = max((row["tokens"] for row in rows), default=TOKENS)
    at = TOKENS if any(row["tokens"] == TOKENS for row in rows) else longest
    share, leanest = _leanest(rows, at)
    rest = [s for s in result["slopes"] if _mole(s["variant"]) and s["rest_to_dense"] is not None]
    flattest = min(rest, key=lambda row: row["rest_to_dense"], default=None)
    timed = next((t for t in result["times"] if t["reference"] == PLAIN and "ratio" in t), None)
    errors = [abs(r["measured_to_predicted"] - 1) for r in rows if "measured_to_predicted" in r]
    found = [
        target(f"peak of a d{DEPTH} at {TOKENS} tokens, share of dense's", PEAK_SHARE, ".2f", at,
               share, leanest),
        target("slope of all but residual stream and keys and values, share of dense's",
               SLOPE_SHARE, ".3f", None, flattest and flattest["rest_to_dense"],
               flattest["variant"] if flattest else ""),
        target(f"step with chunks at {TOKENS} tokens, share of the time without", TIME_RATIO,
               ".2f", timed and timed["tokens"], timed and timed["ratio"]),
        target("largest error of the predicted peaks", TOLERANCE, ".1%", None,
               max(errors, default=None)),
    ]  # fmt: skip
    return found + _capped_targets(result["capped"], config["cap_gib"], official)


def _leanest(rows: list[dict], tokens: int) -> tuple[float | None, str]:
    """The smallest share of dense's peak that a MoleGrad variant has, and its name."""
    peaks = {row["variant"]: row["measured"] for row in rows if row["tokens"] == tokens}
    shares = {n: p for n, p in peaks.items() if _mole(n) and p is not None}
    if peaks.get(DENSE) is None or not shares:
        return None, ""
    name = min(shares, key=shares.get)
    return shares[name] / peaks[DENSE], name


def _mole(variant: str) -> bool:
    return variant.startswith(PLAIN)


def _capped_targets(rows: list[dict], cap: float, official: bool) -> list[dict]:
    under = f"under {cap or 32:g} GiB"
    ours = [row for row in rows if _mole(row["variant"])]
    long = [row for row in ours if row["what"] != "deepest model"]
    trained = [row for row in long if row["trains"]]
    known = trained or [row for row in long if row["trains"] is not None]
    deepest = next((row for row in ours if row["what"] == "deepest model"), None)
    tokens = (float(LONG) if trained else 0.0) if known and official else None
    share, note = None, ""
    if deepest is not None:
        name, tried = deepest["variant"], " or ".join(f"d{depth}" for depth in deepest["tried"])
        note = f"{name}: d{deepest['depth']} trains" if deepest["trains"] else (
            f"{name}: no {tried} trains" if tried else f"{name}: no depth is predicted to fit"
        )  # fmt: skip
        if deepest["trains"] is None:
            note = f"{name}: {deepest['note']}"
        else:
            share = deepest["depth"] / max(1, deepest["predicted_depth"])
    names = ", ".join(row["variant"] for row in trained)
    return [
        Target(f"d{DEPTH} {under}, tokens of a sequence that trains", LONG, tokens, ".0f",
               note=names).row(),
        Target(f"deepest model at {TOKENS} tokens {under}, share of the predicted depth", 1.0,
               share if official else None, ".2f", note=note).row(),
    ]  # fmt: skip


_PEAKS = {  # heading: (key, format)
    "variant": ("variant", "s"), "tokens": ("tokens", "d"), "peak MiB": ("measured_mib", ",.1f"),
    "predicted": ("predicted_mib", ",.1f"),
    "measured / predicted": ("measured_to_predicted", ".3f"), "/ dense": ("to_dense", ".2f"),
    "phase": ("phase", "s"), "passes MiB": ("passes_mib", ",.1f"),
    "stream, K, V": ("own_mib", ",.1f"), "host MiB": ("host_mib", ",.0f"), "note": ("note", "s"),
}  # fmt: skip
_SLOPES = {
    "variant": ("variant", "s"), "bytes per token": ("measured", ",.0f"),
    "predicted": ("predicted", ",.0f"), "/ dense": ("measured_to_dense", ".3f"),
    "without stream, K, V": ("rest", ",.0f"), "its / dense": ("rest_to_dense", ".3f"),
}  # fmt: skip
_TIMES = {
    "variant": ("variant", "s"), "in turn with": ("reference", "s"), "tokens": ("tokens", "d"),
    "ms a step": ("ms", ",.1f"), "ratio": ("ratio", ".3f"), "from": ("ratio_low", ".3f"),
    "to": ("ratio_high", ".3f"), "note": ("note", "s"),
}  # fmt: skip
_CAPPED = {
    "what": ("what", "s"), "variant": ("variant", "s"), "depth": ("depth", "d"),
    "predicted depth": ("predicted_depth", "d"), "tokens": ("tokens", "d"),
    "trains": ("trains_shown", "s"), "peak MiB": ("measured_mib", ",.0f"),
    "note": ("note", "s"),
}  # fmt: skip
_PREDICTED = {
    "variant": ("variant", "s"), "tokens": ("tokens", "d"), "predicted": ("predicted_mib", ",.1f"),
    "phase": ("phase", "s"), "host MiB": ("host_mib", ",.0f"),
}  # fmt: skip


def shown(result: dict, markdown: bool = False) -> str:
    """The tables of `bench` and the targets as text."""
    return "\n\n".join([measured(result, markdown), targets.shown(result["targets"])])


def measured(result: dict, markdown: bool = False) -> str:
    """The tables of `bench` as text."""
    dense = {r["tokens"]: r["measured"] for r in result["peaks"] if r["variant"] == DENSE}
    peaks = []
    for row in result["peaks"]:
        both = row["measured"] is not None and dense.get(row["tokens"])
        peaks.append(
            {
                **row,
                "measured_mib": _mib(row["measured"]),
                "predicted_mib": _mib(row["predicted"]),
                "own_mib": _mib(row["own_passes"]),
                "passes_mib": _mib(row["measured_passes"]),
                "to_dense": row["measured"] / dense[row["tokens"]] if both else None,
                **({"host_mib": row["host"] / MIB} if row["host"] else {}),
            }
        )
    capped = [
        {**r, "measured_mib": _mib(r["measured"]), "trains_shown": _ANSWER[r["trains"]]}
        for r in result["capped"]
    ]
    tables = [
        (peaks, _PEAKS), (result["slopes"], _SLOPES), (result["times"], _TIMES), (capped, _CAPPED),
    ]  # fmt: skip
    return "\n\n".join(table(rows, markdown, columns) for rows, columns in tables if rows)


_ANSWER = {True: "yes", False: "no", None: "not known"}


def predicted(predictions: dict, markdown: bool = False) -> str:
    """A file of predictions as text: a table of peaks, and how deep a model fits."""
    rows = [
        {**r, "predicted_mib": r["predicted"] / MIB, "host_mib": r["host"] / MIB}
        for r in predictions["rows"]
    ]
    lines = [table(rows, markdown, _PREDICTED), ""]
    for name, depth in predictions["deepest"].items():
        cap = f"under {predictions['cap']['cap_gib']:g} GiB"
        lines.append(f"deepest model at {TOKENS} tokens {cap}, {name}: {depth}")
    return "\n".join(lines)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB
