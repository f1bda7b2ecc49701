"""The page of two runs: it stands alone, shows what was recorded, and says what was not."""

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import pytest

from molegrad.gpt.report import method_plots, method_tables
from molegrad.gpt.report.gates import Gate
from molegrad.gpt.report.page import write_page
from molegrad.gpt.report.plots import svg
from molegrad.gpt.report.record import RunRecord

LAYERS = ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")
VOID = {"meta", "br", "hr", "img", "input", "link"}


def metrics(converted):
    lines = []
    for step in range(1, 41):
        line = {
            "step": step,
            "total_training_time": 0.1 * step,
            "train/loss": 6 - 0.05 * step,
            "train/loss_raw": 6 - 0.05 * step,
            "train/dt": 0.1,
            "train/peak_memory_bytes": 400 * 2**20,
            **{f"time/{p}_ms": v for p, v in (("forward", 20.0), ("backward", 40.0))},
        }
        if converted and step % 10 == 0:
            line |= {"streaming/energy_capture": 0.9, "streaming/subspace_drift": 0.02}
            line |= {"health/findings": 1}
            for i, layer in enumerate(LAYERS):
                line[f"layer/{layer}/energy_capture"] = 0.8 + 0.1 * i
                line[f"layer/{layer}/subspace_drift"] = 0.02
            line |= {"shadow/energy_capture": 0.85, "shadow/best_energy": 0.95}
        lines.append(line)
    lines.append({"step": 40, "val/bpb": 2.5, "total_training_time": 4.0})
    return [*lines, {"step": 40, "memory/weights": 2**20, "memory/gradients": 2**19}]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shadow = [
        {
            "step": step,
            "layer": layer,
            "energy_capture": 0.85,
            "cosine": 0.85,
            "best_energy": "nan",
            "spectrum": [3.0, 1.0, 0.5 / step],
            "estimate_spectrum": [2.9, 0.9, 0.0],
        }
        for step in (10, 20, 30, 40)
        for layer in LAYERS
    ]
    found = {"step": 20, "layer": LAYERS[0], "kind": "frozen", "action": "warn"}
    found["message"] = "the drift is <1e-5 & falling"
    for name, rows in (("shadow", shadow), ("health", [found])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"steps": 40, "depth": 2, "device_type": "cpu", "run": "m"}
    low = {**config, "enable_streaming": True, "streaming_rank_k": 8, "streaming_probes": 2}
    return [
        RunRecord("m-dense", "base", None, {**config, "run": "m-dense"}, metrics(False), []),
        RunRecord("m", "base", folder, low, metrics(True), []),
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory, records):
    return page(tmp_path_factory.mktemp("page") / "page.html", records)


def page(path, records, samples=None, gates=None):
    gates = gates or [
        Gate("ended/dense", True, 40, 40, "last step"),
        Gate("quality", False, 2.5, 1.0, "above dense's & more"),
        Gate("metrics/health", None, None, 0, "no checks"),
    ]
    samples = {"m": [("The <p>", " cat & dog")]} if samples is None else samples
    predicted = {"m-dense": {"weights": 2**20}, "m": {"weights": 2**20, "total": 2**30}}
    return write_page(
        path, gates=gates, records=records, predicted=predicted, samples=samples,
        command="python -m scripts.validate --steps=40",
    ).read_text()  # fmt: skip


class Balance(HTMLParser):
    """Notes tags that are not closed in their order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def plain(text):
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def test_the_page_stands_alone_and_is_well_formed(text):
    parser = Balance()
    parser.feed(text)
    assert not parser.wrong and not parser.open
    assert "<script" not in text and "@import" not in text and "<link" not in text
    for address in re.findall(r'(?:src|href|data)\s*=\s*"([^"]*)"', text):
        assert address.startswith("#"), address
    identifiers = re.findall(r"url\(#([^)]*)\)", text)
    assert identifiers and all(f'id="{name}"' in text for name in identifiers)


def test_gates_and_their_verdict(text, tmp_path):
    assert "Not met: quality." in plain(text)
    assert '<td class="not-met">not met</td><td>quality</td>' in text
    assert '<td class="does-not-apply">does not apply</td>' in text
    assert "above dense's & more" in plain(text) and "above dense&#x27;s &amp; more" in text
    good = page(tmp_path / "page.html", [], gates=[Gate("a", True, 1, 1, "")])
    assert "Every gate is met." in good


def test_every_plot_with_data_is_there(text):
    for name in ("val-bpb-step", "train-loss", "energy-capture", "subspace-drift", "spectra"):
        assert re.search(rf'<figure id="plot-{name}"[^>]*><svg', text), name
    for name in ("memory", "phases", "step-time"):
        assert re.search(rf'<figure id="plot-{name}"[^>]*><svg', text), name
    seen = plain(text)
    for words in ("m, mean of layers", "true, of the shadow layers", "h.1.mlp.c_fc", "step 40"):
        assert words in seen, words
    assert "Condition number of the kept modes: m: no condition_number: not logged" in seen
    assert "only methods 'sampled' and 'projected' add such noise" in seen


def test_findings_samples_configuration_and_commands(text):
    assert "<mark>The &lt;p&gt;</mark> cat &amp; dog" in text
    seen = plain(text)
    assert "the drift is <1e-5 & falling" in seen and "frozen" in seen
    assert "python -m scripts.validate --steps=40" in seen
    assert "python -m scripts.base_train --enable_streaming=True" in seen
    differ = text.split("In which the runs differ")[1].split("</table>")[0]
    assert "streaming_rank_k" in differ and "depth" not in differ


def test_without_any_record_it_still_says_what_happened(tmp_path):
    text = page(tmp_path / "deep/er/page.html", [], samples={"m": []})
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["page.html"]
    seen = plain(text)
    assert "No run with converted layers left a record" in seen and "No model to write any" in seen
    assert "No findings were recorded" in seen


def test_missing_data_is_named(tmp_path, records):
    bare = RunRecord("m", "base", None, {"enable_streaming": True}, [{"step": 1}], [])
    seen = plain(page(tmp_path / "page.html", [records[0], bare]))
    assert "m has no val/bpb against step" in seen
    assert "m: no spectra: no shadow comparison (--shadow-every)" in seen
    assert "m: no times by phase were logged" in seen and "m: memory was not measured" in seen


def test_plots_do_not_share_identifiers_and_are_reproducible(records):
    made = [[svg(plot) for plot in method_plots.method_plots(records)] for _ in range(2)]
    assert made[0] == made[1]
    clips = [set(re.findall(r'<clipPath id="([^"]*)"', text)) for text in made[0] if text]
    assert len(clips) >= 3 and all(clips)
    assert len(set.union(*clips)) == sum(map(len, clips))


def test_tables_hold_what_the_runs_recorded(records):
    header, rows = method_tables.shadow_table(records)
    assert len(rows) == 3 and rows[0][:4] == ["m", "40", "h.0.mlp.c_fc", "0.85"]
    assert rows[2][2:4] == ["mean", "0.85"] and rows[2][header.index("best at this rank")] == ""
    header, rows = method_tables.phase_table(records)
    assert rows[1] == ["m", "20.0", "40.0", "", "", "", "", "60.0"]
    assert method_tables.health_table(records)[1][0][:4] == ["m", "20", "h.0.mlp.c_fc", "frozen"]
    metric = dict((row[0], row[1:]) for row in method_tables.metrics_table(records)[1])
    assert metric["energy_capture"] == ["0.9", "0.9"]


def test_a_flood_of_findings_is_counted(tmp_path, records):
    rows = [{"step": i, "layer": "a", "kind": "frozen"} for i in range(30)]
    (tmp_path / "health.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flooded = dataclasses.replace(records[1], folder=tmp_path)
    shown = method_tables.health_table([flooded], limit=10)[1]
    assert len(shown) == 11 and shown[-1][-1] == "20 more: 20 frozen"


def test_stretches_of_phase_times_keep_their_means():
    x, y = list(range(1, 11)), [1.0, 3.0] * 5
    assert method_plots._binned(x, y, 10, 5) == [2.0] * 5
    assert method_plots._binned([10], [7.0], 10, 2) == [0.0, 7.0]
