import json

from molegrad.bench import gpu, grad, memory, step


def test_a_report_of_what_was_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grad, "bandwidth", lambda device: {"read": 2e9, "copy": 1e9, "best": 2e9})
    parts = "tests 0 31\nops_tests 124 40\nsanitizer missing 0\ngrad 0 9\nstep 2 4\n"
    (tmp_path / "parts.txt").write_text(parts)
    (tmp_path / "sanitizer.log").write_text("no compute-sanitizer here\n")
    (tmp_path / "tests.log").write_text("....\n12 passed in 3.10s\n")
    (tmp_path / "step.log").write_text("out of memory\n")
    config = ["--shapes=16x24", "--tokens=32", "--ranks=4", "--repeats=1", "--depth=2", "--json"]
    assert grad.main(config) == 0
    (tmp_path / "grad.log").write_text(capsys.readouterr().out)
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert results["step"] is None and results["grad"]["gradients"]
    assert results["parts"][0]["said"] == "12 passed in 3.10s"
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| tests | passed | 31 | 12 passed in 3.10s |" in text
    assert "| sanitizer | not run | 0 | no compute-sanitizer here |" in text
    assert "| step | failed (2) | 4 |" in text and "| ops_tests | out of time | 40 |" in text
    # What was measured on a CPU meets no target of a GPU.
    assert len(results["targets"]) == text.count("| not measured |") == 7
    assert text.index("## Targets") < text.index("## Ops")
    assert "Memory: 2 GB/s read by a sum, 1 GB/s copied" in text and "µs p20" in text
    assert "Not measured." in text and "vs dense" in text

    small = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=2"]
    assert step.main([*small, "--methods=exact", "--json"]) == 0
    (tmp_path / "step.log").write_text(capsys.readouterr().out)
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Not measured." not in text and "| 2x16 | no | exact |" in text
    assert "Not measured: FULL=1" in text

    small = ["--depth=1", "--aspect-ratio=32", "--vocab=64", "--lengths=16,32", "--time-at=-1"]
    assert memory.main([*small, "--variants=dense,MoleGrad", "--json"]) == 0
    (tmp_path / "memory.log").write_text(capsys.readouterr().out)
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "Not measured" not in text and "| MoleGrad | 32 |" in text
    assert text.count("| not measured |") == 13


def test_a_benchmark_s_result_is_found_whatever_follows_it(tmp_path):
    log = tmp_path / "step.log"
    said = ["{not json", '{"rows": [1]}', '{"rows": [2]}', "[3]", "{cut off", "Warning: bye"]
    log.write_text("\n".join(said) + "\n")
    assert gpu._last_json(log) == {"rows": [2]}
    log.write_text("Traceback\n{'rows': 1}\n")
    assert gpu._last_json(log) is None and gpu._last_json(tmp_path / "none.log") is None


def test_compiled_steps_and_results_that_were_cut_short(tmp_path, capsys):
    small = ["--depth=2", "--aspect-ratio=32", "--vocab=300", "--batches=2x16", "--steps=1"]
    assert step.main([*small, "--methods=exact", "--json"]) == 0
    eager = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = [row | {"compiled": True} for row in eager["rows"]]
    (tmp_path / "parts.txt").write_text("step 0 9\ncompiled 124 60\n")
    (tmp_path / "step.log").write_text(json.dumps(eager) + "\n")
    (tmp_path / "compiled.log").write_text(json.dumps(eager | {"rows": rows, "interrupted": True}))
    stopped = {name: [] for name in grad.TABLES} | {"device": "a GPU", "interrupted": True}
    stopped |= {"bandwidth": None, "config": {"dtype": "bfloat16", "device": "cuda"}}
    (tmp_path / "grad.log").write_text(json.dumps(stopped) + "\n")
    assert gpu.main([f"--folder={tmp_path}"]) == 0
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| compiled | out of time | 60 |" in text
    assert "| 2x16 | no | exact |" in text and "| 2x16 | yes | exact |" in text
    assert text.count("Interrupted: what was measured until then.") == 2
    assert "a GPU, bfloat16. Memory bandwidth: not measured." in text
    (tmp_path / "step.log").unlink()
    assert gpu.collect(tmp_path)["step"]["rows"] == rows


def test_the_report_names_the_gpu_its_driver_and_the_versions():
    none = {"supported": False, "reason": "needs cuBLASLt 13.4 or newer"}
    taken = {"wanted": "auto", "bfloat16": "own", "float32": "cublaslt"}
    info = {
        "cuda_built": {"toolkit": 13000, "architectures": "90a-real,120-real"},
        "cuda_found": {"cublaslt": 130100},
        "paths": {"grouped": none, "sketch": {"supported": True, "reason": "by dtype"} | taken},
    }
    machine = {"gpu": "H100", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0"}
    results = {"machine": machine | {"build_info": info}, "parts": [], "targets": []}
    text = gpu.markdown(results | {"grad": None, "step": None, "memory": None})
    assert text.startswith(
        "# H100\n\nDriver 580.1, torch 2.11.0, CUDA 13.0; native extension: built"
    )
    assert "built with CUDA 13.0 for 90a-real,120-real, cuBLASLt 130100." in text
    assert "- grouped: no, needs cuBLASLt 13.4 or newer\n" in text
    assert "- sketch: yes, by dtype: wanted auto, bfloat16 own, float32 cublaslt\n" in text


def test_nothing_measured_is_an_error(tmp_path, capsys):
    assert gpu.main([f"--folder={tmp_path}"]) == 1
    assert "run bash scripts/gpu_check.sh" in capsys.readouterr().out
