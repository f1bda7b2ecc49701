import xml.etree.ElementTree as ElementTree

from molegrad.lab import plots, summary
from molegrad.lab.sweep import LabConfig, cells, make_run
from tests.lab.test_summary import known_runs

TIME = {"ratio": 0.75, "ratio_low": 0.7, "ratio_high": 0.8, "ms": 12.0}


def rows(text, **values):
    config = LabConfig(**{"methods": "factored-tangent,adamw", "seeds": 2, **values})
    times = {make_run(config, text, cell, 0.02, 0).time_key: TIME for cell in cells(config)}
    return summary.summarise(config, text, known_runs(config, text), times)


def names(files):
    return [file.stem for file in files]


def words(file):
    root = ElementTree.parse(file).getroot()
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_axes_with_several_values_get_a_plot(text, tmp_path):
    files = plots.draw(rows(text), tmp_path / "new")
    assert names(files) == [
        "gap_memory",
        "gap_time",
        "gap_length",
    ]
    assert "tokens trained on, learning rate still falling" in words(files[2])
    values = {"ranks": "8,16", "sizes": "2x64,4x128", "batch_sizes": "512,2048"}
    files = plots.draw(rows(text, **values, num_iterations="100,200"), tmp_path)
    assert names(files) == ["gap_memory", "gap_time", "gap_rank", "gap_batch", "gap_length"]
    shown = words(files[0])
    assert {"2 × 64, 512 tokens a step, 51,200 tokens", "factored-tangent", "8", "16"} <= set(shown)
    assert "factored-tangent, k = 16" in words(files[3])
    assert "0.125" in words(files[2]) and "dense" not in words(files[2])


def test_without_times_or_results_there_is_less_to_draw(text, tmp_path):
    untimed = [{**row, "time": None, "curve_gaps": []} for row in rows(text)]
    assert names(plots.draw(untimed, tmp_path)) == ["gap_memory"]
    failed = [{**row, "status": "failed"} for row in untimed]
    assert plots.draw(failed, tmp_path) == []


def test_the_same_rows_make_the_same_files(text, tmp_path):
    made = rows(text, ranks="8,16")
    one, two = plots.draw(made, tmp_path / "1"), plots.draw(made, tmp_path / "2")
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]
    assert one and b"dc:date" not in one[0].read_bytes()
