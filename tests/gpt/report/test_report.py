"""The report: what it says is in the runs' files, and nothing that comes from them can break it."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from molegrad.gpt import paths
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.evaluate.evaluate import main_base, main_chat
from molegrad.gpt.report import plots
from molegrad.gpt.report.record import RunRecord, differences, peaks, read_runs, visible
from molegrad.gpt.report.report import (
    ReportConfig,
    Section,
    code,
    escaped,
    main,
    report,
    sections,
    table,
    write,
)
from molegrad.gpt.train.base import base_train
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.gpt.train.flags import parse, resolved
from molegrad.gpt.train.logger import read_metrics
from tests.gpt.conftest import BASE

STREAM = [
    "--enable_streaming=True",
    "--streaming_rank_k=4",
    "--streaming_min_layer_utilization=0",
    "--streaming_probes=2",
]
LAYERS = ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")
EVIL = "a|b $x_ <script>alert(1)</script> *c* `d` \x1b]52;c;ZXZpbA==\x07 ![x](y) \u202e"


@pytest.fixture(scope="module")
def text(tiny_folder):
    """The report of the run "tiny" and of a low-rank run beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.ENV, str(tiny_folder))
        words = [*BASE, "--run=lowrank", "--num-iterations=60", "--overwrite", *STREAM]
        base_train(parse(BaseTrainConfig, [*words, "--shadow-every=20"]))
        quick = ["--run=tiny", "--max-questions=8"]
        assert main_base(quick) == 0 and main_chat(quick) == 0
        path = report(ReportConfig(runs="tiny,lowrank", show=False))
        assert path == tiny_folder / "report/report.md"
        return path.read_text()


def record(label="a", lines=(), config=None, **changes):
    """A record as a run of 20 steps would give it."""
    metrics = [
        {"step": i, "train/dt": 0.01 * i, "train/tok_per_sec": 100.0 / i, "train/loss": 5.0}
        for i in range(1, 21)
    ]
    metrics += [{"step": 20, "val/bpb": 2.0}, *lines]
    return RunRecord(label, "base", None, {"steps": 20, **(config or {})}, metrics, [], **changes)


def low(folder=None, layer=LAYERS[1], **metrics):
    """A record of a run with converted layers, which compared two of them at two steps."""
    lines = [
        {"step": step, **{f"layer/{name}/{key}": value / 2 for name in LAYERS
                          for key, value in metrics.items()},
         **{f"streaming/{key}": value for key, value in metrics.items()}}
        for step in (10, 20)
    ]  # fmt: skip
    made = record("low", lines, {"enable_streaming": True, "streaming_method": "power"})
    if folder is not None:
        spectrum = {"spectrum": [3.0, 1.0], "estimate_spectrum": [2.9, 0.0], "best_energy": "nan"}
        rows = [{"step": s, "layer": name, "cosine": 0.8, **spectrum}
                for s in (10, 20) for name in (LAYERS[0], layer)]  # fmt: skip
        (folder / "shadow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = {"step": 20, "layer": layer, "kind": "frozen", "action": "warn", "message": EVIL}
        (folder / "health.jsonl").write_text((json.dumps(found) + "\n") * 60)
        made = replace(made, folder=folder)
    return made


def written(folder, *records):
    path = write(folder / "deep/report.md", "Title", sections(records, "the command"))
    return path.read_text(), path.with_suffix(".html").read_text()


def row_of(text, name):
    return next(line for line in text.splitlines() if line.startswith("|") and f"({name})" in line)


def part(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def test_first_come_one_table_and_two_plots(text):
    titles = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert titles[0] == "Base training" and titles[-1] == "Commands"
    blocks = part(text, "Base training").strip().split("\n\n")
    assert blocks[0].startswith("| method (run) | bits per byte | gap to dense | ms a step |")
    assert blocks[1].startswith("![Quality](") and blocks[3].startswith("![Memory by part](")


def test_the_table_is_what_the_runs_logged(text, tiny_folder):
    final = {}
    for run in ("tiny", "lowrank"):
        records = read_metrics(tiny_folder / f"runs/{run}/base")
        final[run] = [r["val/bpb"] for r in records if "val/bpb" in r][-1]
        assert f"{final[run]:.4f}" in row_of(text, run)
    gap = 100 * (final["lowrank"] / final["tiny"] - 1)
    assert f"| {gap:+.2f}% |" in row_of(text, "lowrank")
    assert "| reference |" in row_of(text, "tiny") and "| dense (tiny) |" in text
    assert "rank 4" in row_of(text, "lowrank").split("|")[1]
    assert "| 30,720 |" in text  # 60 steps of 8 x 64 tokens
    assert "differ in more than the method" not in part(text, "Base training")


def test_every_part_is_there(text, tiny_folder):
    config = json.loads((tiny_folder / "runs/tiny/base/config.json").read_text())
    facts = (config["corpus"]["sha256"], config["tokenizer"], config["machine"]["torch"])
    for fact in (*facts, "four_way", "arithmetic", "spelling", "Return a new array", "tiny/sft"):
        assert fact in text
    assert "transformer.h.0.mlp.c_fc" in part(text, "Converted layers")
    records = read_metrics(tiny_folder / "runs/lowrank/base")
    first, *_, last = [r["streaming/energy_capture"] for r in records
                       if "streaming/energy_capture" in r]  # fmt: skip
    assert f"| energy_capture | {first:.4g} | {last:.4g} |" in text
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"energy_capture", "spectra-lowrank", "phases", "sft-loss", "bpb-time"} <= {
        image.removeprefix("report-plots/").removesuffix(".svg") for image in images
    }
    for image in images:
        assert (tiny_folder / "report" / image).read_text().startswith("<svg ")


class Balance(HTMLParser):
    """Notes tags that are not closed in their order, and those that load or run something."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "a"):
            self.wrong.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def test_the_page_stands_alone(tmp_path):
    text, page = written(tmp_path, record(), low(tmp_path, EVIL, energy_capture=0.9))
    parser = Balance()
    parser.feed(page)
    assert not parser.wrong and not parser.open
    identifiers = re.findall(r"url\(#([^)]*)\)", page)
    assert identifiers and all(f'id="{name}"' in page for name in identifiers)
    definitions = re.findall(r' id="([^"]*)"', page)
    clips = [name for name in definitions if name.startswith("p") and len(name) > 8]
    assert len(clips) == len(set(clips)) > 3
    for opening in re.findall(r"<svg [^>]*>", page):
        assert "viewBox" in opening and 'width="100%"' in opening and "height" not in opening
    for shown in (text, page):
        assert "<script" not in shown and "\x1b" not in shown and "\u202e" not in shown
        assert r"\x1b" in shown.replace("\\\\", "\\") and "\x07" not in shown


def test_text_of_any_kind_is_shown_as_it_is():
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    shown = reader.render(table(["a"], [[EVIL], ["_x_ y_z"]]))
    assert shown.count("<td") == 2 and "<em>" not in shown and "<code>" not in shown
    assert "a|b $x_ &lt;script&gt;" in shown and "*c* `d`" in shown and "_x_ y_z" in shown
    assert "![x](y)" in shown and "<img" not in shown
    fenced = reader.render(code("```\n# no title\n<b>"))
    assert fenced == "<pre><code>```\n# no title\n&lt;b&gt;\n</code></pre>\n"
    assert visible("a\tb\nc\x9bd") == "a\tb\nc\\x9bd" and escaped("a\n# b") == "a \\# b"
    assert table(["a"], []) == "" and code("") == ""


def test_what_there_is_decides_what_is_drawn(tmp_path):
    text, _ = written(tmp_path, record(), low(subspace_drift=0.1, new_metric=3.0))
    assert "![Subspace drift]" in text and "![Energy capture]" not in text
    assert "| new_metric | 3 | 3 |" in text and "shadow" not in text
    assert "## Health" not in text and "## Evaluations" not in text
    text, _ = written(tmp_path, record("one"), record("two"))
    assert "## Gradient estimates" not in text


def test_comparisons_and_findings_are_shown(tmp_path):
    text, _ = written(tmp_path, low(tmp_path))
    shown = part(text, "Gradient estimates")
    rows = [line for line in shown.splitlines() if line.startswith("| power (low) | 20 |")]
    assert [row.split(" | ")[2] for row in rows] == ["h.0.mlp.c_fc", "h.1.mlp.c_fc", "mean"]
    assert all("0.8" in row for row in rows)
    assert part(text, "Health").count("frozen") == 50 and "10 more" in part(text, "Health")
    figure = plots.spectra(low(tmp_path)).figure
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels[:2] == ["h.0.mlp.c_fc, true", "h.0.mlp.c_fc, estimate"]


def test_times_by_phase_are_means_over_all_steps(tmp_path):
    lines = [{"step": s, "time/forward_ms": 20.0} for s in range(1, 11)]
    lines.append({"step": 10, "time/shadow_ms": 50.0})
    text, _ = written(tmp_path, record(lines=lines))
    assert "| 20.0 | 0.0 | 0.0 | 0.0 | 0.0 | 5.0 | 25.0 |" in part(text, "Time by phase")


def test_missing_numbers_are_not_filled_in(tmp_path):
    bare = RunRecord("b", "base", None, {"steps": 20}, [{"step": 3}], [])
    text, _ = written(tmp_path, record(), bare)
    assert row_of(text, "b").count("not recorded") == 3
    assert "b ended after step 3 of 20" in text
    text, _ = written(tmp_path, record(config={"enable_streaming": True}))
    assert "gap to dense" not in text
    metrics = [{"step": 1, "val/bpb": 3.0}, {"step": 2, "val/bpb": "nan"}]
    assert replace(record(), metrics=metrics).series("val/bpb") == ([1], [3.0])
    assert replace(record(), metrics=[{"step": 1, "val/bpb": math.inf}]).last("val/bpb") is None


def test_medians_leave_the_first_steps_out():
    row = record().summary()
    assert row["step_ms"] == pytest.approx(130)  # of steps 6 .. 20
    assert row["step_ms_spread"] == "88.0 to 172.0"
    assert row["bpb"] == 2.0 and row["gradient_bytes"] is None and row["steps"] == 20


def test_runs_that_are_not_alike_are_named():
    one = record("one", config={"depth": 2, "corpus": {"sha256": "a" * 64}})
    two = record("two", config={"depth": 3, "corpus": {"sha256": "b" * 64}})
    assert differences([one, two]) == [
        "depth: one 2, two 3",
        "corpus sha256: one aaaaaaaaaaaa..., two bbbbbbbbbbbb...",
    ]


def test_all_utilisations_rest_on_one_peak(tmp_path):
    def run(label, mfu):
        lines = [{"step": s, "train/mfu": mfu, "train/tokens": 100, "total_training_flops": 1e12}
                 for s in range(6, 21)]  # fmt: skip
        return record(label, lines, {"machine": {"device": "X"}})

    slow, fast = run("slow", 102.0), run("fast", 51.0)
    assert peaks([slow, fast])["X"] == pytest.approx(2 * peaks([slow])["X"])
    text, _ = written(tmp_path, slow, fast)
    rows = part(text, "Base training").split("| method (run) | steps")[1]
    assert rows.count("| 51.0 |") == 2


def test_parts_that_cannot_be_seen_have_no_bar():
    rows = {"a": {"weights": 8.0, "bases": 1e-6}, "b": {"weights": 4.0, "gradients": 4.0}}
    figure = plots.bars("memory", "Memory", "", rows, "MiB").figure
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["weights", "gradients"]
    assert [note.get_text() for note in figure.axes[0].texts] == [" 8.0", " 8.0"]
    assert plots.bars("memory", "Memory", "", {"a": {}}, "MiB") is None


def test_long_curves_keep_their_means_and_short_ones_their_points():
    x, y = plots.thinned(range(1000), [1.0, 3.0] * 500)
    assert len(x) == plots.POINTS and sum(y) / len(y) == pytest.approx(2, rel=0.01)
    assert plots.thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])
    made = [plots.svg(plots.curve([record()], plots.QUALITY.__class__(
        "loss", "t", "c", "train/loss", ("x", "y")))) for _ in range(2)]  # fmt: skip
    assert made[0] == made[1]


def test_the_commands_give_the_same_configurations(text, tiny_folder, monkeypatch):
    monkeypatch.setenv(paths.ENV, str(tiny_folder))
    block = part(text, "Commands").split("```")[1].strip().splitlines()
    names = ["report", "tok_train", "base_train", "base_eval", "chat_sft", "chat_eval"]
    assert [line.split()[2] for line in block] == [f"scripts.{n}" for n in (*names, "base_train")]
    for line, run in ((block[2], "tiny"), (block[6], "lowrank")):
        config = parse(BaseTrainConfig, line.split()[3:])
        saved = json.loads((tiny_folder / f"runs/{run}/base/config.json").read_text())
        for name, value in resolved(config).items():
            if name == "tokenizer":
                value = Tokenizer.load(paths.tokenizer_dir(value)).fingerprint
            if name != "overwrite":
                assert value == saved[name], name


def test_a_tokenizer_that_is_gone_is_copied_from_the_run(text, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setenv(paths.ENV, str(tiny_folder))
    run = read_runs(["lowrank"])[0]
    monkeypatch.setenv(paths.ENV, str(tmp_path))
    copy, train = run.commands()
    assert copy == f"cp -r {run.folder}/tokenizer {tmp_path}/tokenizers/lowrank"
    assert "--tokenizer=lowrank" in train


def test_several_processes_are_started_by_torchrun():
    run = record(config={"machine": {"processes": 2}, "depth": 3})
    assert run.commands() == ["torchrun --nproc-per-node=2 -m scripts.base_train -- --depth=3"]


def test_the_command_shows_the_report(text, tiny, tmp_path, capsys):
    assert main(["--run=tiny", f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "Base training" in out and "written" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.md", "report.html", "report-plots",
    }  # fmt: skip
    assert ReportConfig(runs="a, b,a", run="c").names == ["a", "b", "c"]
    with pytest.raises(SystemExit):
        main([])


def test_missing_runs_are_named(tiny, capsys):
    assert main(["--runs=nothing"]) == 2
    assert "there is no run 'nothing'" in capsys.readouterr().err
    (tiny / "runs/empty").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match="'empty' has no metrics"):
        read_runs(["empty"])
    (tiny / "runs/empty").rmdir()


def test_a_section_without_parts_is_left_out(tmp_path):
    path = write(tmp_path / "r.md", "T", [Section("Empty", ["", None]), Section("Full", ["x"])])
    assert "Empty" not in path.read_text() and "## Full\n\nx" in path.read_text()
