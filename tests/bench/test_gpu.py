import json

from molegrad.bench import gpu, grad, step


def test_a_report_of_what_was_measured(tmp_path, capsys):
    (tmp_path / "parts.txt").write_text("tests 0 31\nsanitizer missing 0\ngrad 0 9\nstep 2 4\n")
    (tmp_path / "tests.log").write_text("....\n12 passed in 3.10s\n")
    (tmp_path / "step.log").write_text("out of memory\n")
    config = ["--shapes=16x24", "--tokens=32", "--ranks=4", "--repeats=1", "--json"]
    assert grad.main(config) == 0
    (tmp_path / "grad.log").write_text(capsys.readouterr().out)
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["step"] is None and results["grad"]["gradients"]
    assert results["parts"][0]["said"] == "12 passed in 3.10s"
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| tests | passed | 31 | 12 passed in 3.10s |" in text
    assert "| sanitizer | not run | 0 |" in text and "| step | failed (2) | 4 |" in text
    assert "Not measured." in text and "vs dense" in text

    small = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=2"]
    assert step.main([*small, "--methods=exact", "--json"]) == 0
    (tmp_path / "step.log").write_text(capsys.readouterr().out)
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Not measured." not in text and "| 2x16 | no | exact |" in text


def test_nothing_measured_is_an_error(tmp_path, capsys):
    assert gpu.main([f"--folder={tmp_path}"]) == 1
    assert "run bash scripts/gpu_check.sh" in capsys.readouterr().out
