import json
import os
import subprocess
import sys

import pytest
import torch

from molegrad.bench import grad

TINY = ["--shapes=24x16,16x40", "--tokens=8,20", "--ranks=2,4", "--repeats=2"]


def test_the_command_prints_tables_and_then_one_json_object(capsys):
    assert grad.main([*TINY, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("torch ") and "vs dense" in lines[2]
    result = json.loads(lines[-1])
    hows = 2 if result["native"] else 1
    assert len(result["gradients"]) == 2 * 2 * 2 * (8 if result["native"] else 3)
    native = [name for name in grad.SMALL_OPS if grad.has_native(name, torch.device("cpu"))]
    assert len(result["small"]) == 2 * 2 * (len(grad.SMALL_OPS) + len(native))
    assert len(result["layers"]) == 2 * 2 * 2 * (1 + 4 + 3)
    kernels = len(grad.SHARES) * len(grad.BLOCKS) * hows
    assert len(result["sampled"]) == 2 * 2 * (1 + kernels)
    assert all(row["vs_dense"] > 0 for row in result["sampled"])
    assert all(row["vs_dense"] > 0 for row in result["layers"])
    for row in result["gradients"]:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        dense = row["op"] == "dense"
        work = 2 * row["n"] * row["m"] if dense else 4 * row["k"] * (row["n"] + row["m"])
        assert row["gflops"] * row["us_p50"] * 1e3 == pytest.approx(row["tokens"] * work)
        assert (row["vs_dense"] == 1.0) if dense else row["of_limit"] > 0
        assert (row["vs_reference"] is not None) == (row["how"] == "native")
    assert result["config"]["repeats"] == 2


def test_markdown(capsys):
    assert grad.main([*TINY, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| in | out | tokens | k | op | how |" in out and "| --- |" in out
    assert not out.rstrip().endswith("}")


def test_ratios_pair_the_rounds():
    # A load that slows one round by 10 must not show in the ratio.
    assert grad.median_ratio([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == 2.0
    assert grad.percentiles([1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6])["us_p20"] == pytest.approx(2.0)


def test_every_round_runs_every_variant_in_turn():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = grad.time_interleaved(runs, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4  # the first is the warm-up
    assert [len(x) for x in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes=24"], "shapes=24"),
        (["--tokens=a"], "tokens=a"),
        (["--tokens=0"], "tokens=0"),
        (["--ranks=32", "--shapes=24x16"], "rank 32 does not fit shape 24x16"),
        (["--dtype=int8"], "dtype=int8"),
        (["--repeats=0"], "repeats=0"),
    ],
)
def test_bad_flags_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        grad.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_it_works_without_the_extension():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench_grad", *TINY, "--json"],
        env=os.environ | {"MOLEGRAD_BUILD": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["native"] is False and "MOLEGRAD_BUILD=0" in result["build_info"]["reason"]
    assert {row["how"] for row in result["gradients"]} == {"torch.mm", "reference"}
