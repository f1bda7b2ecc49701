"""Files of records: one JSON object a line (metrics.jsonl, shadow.jsonl, health.jsonl)."""

from __future__ import annotations

import json
import math
from pathlib import Path


def line_of(record: dict) -> str:
    """A record as a line. JSON has no NaN and Inf: "nan", "inf" and "-inf" stand for them."""
    return json.dumps(_safe(record), allow_nan=False) + "\n"


def read_records(path: Path, up_to: float = math.inf) -> list[dict]:
    """The records of a file; [] where there is none. A half-written last line (a killed run) is
    left out, and so are the records of steps after `up_to`, where that is given."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    if up_to < math.inf:
        records = [record for record in records if record["step"] <= up_to]
    return records


def _safe(value):
    if isinstance(value, dict):
        return {key: _safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_safe(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
