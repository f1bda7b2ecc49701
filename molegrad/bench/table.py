"""Rows of measurements as aligned text or as Markdown."""

from __future__ import annotations

COLUMNS = {  # heading: (key, format), of what molegrad.bench.grad measures
    "in": ("n", "d"), "out": ("m", "d"), "tokens": ("tokens", "d"), "k": ("k", "d"),
    "share": ("share", "g"), "block": ("block", "d"), "stride": ("stride", "d"),
    "depth": ("depth", "d"), "layers": ("layers", "d"),
    "op": ("op", "s"), "how": ("how", "s"),
    "µs p20": ("us_p20", ".0f"), "p50": ("us_p50", ".0f"), "p80": ("us_p80", ".0f"),
    "host µs": ("us_host", ".0f"),
    "GFLOP/s": ("gflops", ".0f"), "TFLOP/s": ("tflops", ".1f"), "GB/s": ("gbytes", ".1f"),
    "vs dense": ("vs_dense", ".2f"), "of limit": ("of_limit", ".0%"),
    "of floor": ("of_floor", ".0%"), "vs reference": ("vs_reference", ".2f"),
    "note": ("note", "s"),
}  # fmt: skip


def table(rows: list[dict], markdown: bool = False, columns: dict | None = None) -> str:
    """The rows as aligned text or as Markdown; columns that no row has are left out.

    Args:
        columns: heading -> (key of a row, format); by default those of `molegrad.bench.grad`.
    """
    columns = columns or COLUMNS
    columns = {h: c for h, c in columns.items() if any(c[0] in row for row in rows)}
    lines = [list(columns)]
    for row in rows:
        values = ((row.get(key), spec) for key, spec in columns.values())
        lines.append(["" if x is None else format(x, spec) for x, spec in values])
    if markdown:
        lines.insert(1, ["---"] * len(columns))
        cells = ([x.replace("|", "\\|") for x in line] for line in lines)
        return "\n".join("| " + " | ".join(line) + " |" for line in cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines
    )
