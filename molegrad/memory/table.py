"""Rows of measurements as aligned text or as Markdown."""

from __future__ import annotations


def table(rows: list[dict], columns: dict[str, tuple[str, str]], markdown: bool = False) -> str:
    """The rows as text; columns that no row has are left out, and so are values that are None.

    Args:
        columns: heading -> (key of a row, format).
    """
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
