"""What the native extension says of itself: versions, instruction set, paths on a GPU."""

import pytest
import torch

from molegrad import _native

MODULE, REASON = _native.load()
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"native kernels: {REASON}")


def test_build_info():
    info = _native.build_info()
    assert info["native"] and info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert set(info["paths"]) == {"kernels", "fp8", "grouped", "cublaslt_grouped", "sketch"}
    assert all(set(path) >= {"supported", "reason"} for path in info["paths"].values())
    if not info["cuda"]:
        none = {"supported": False, "reason": "this build has the CPU ops only"}
        assert all(path == none for path in info["paths"].values())
        with pytest.raises(RuntimeError, match="this build has the CPU ops only"):
            MODULE.sketch_path("bfloat16", 768, 3072, 8192, 32)


def test_the_path_of_a_sketch_is_read_at_every_call(monkeypatch):
    if not _native.build_info()["cuda"]:
        pytest.skip("this build has the CPU ops only")

    def path(wanted, dtype="bfloat16", tokens=8192):
        monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", wanted)
        return MODULE.sketch_path(dtype, 768, 3072, tokens, 32)

    assert [path(x) for x in ("own", "fused", "auto", "own")] == ["own", "fused", "own", "own"]
    assert path("fused", "float16") == "own"
    known = _native.build_info()["paths"]["sketch"]
    assert known["wanted"] == "fused" and known["bfloat16"] == "fused" and known["float16"] == "own"
    rules = "768x3072x4096=fused,own"
    assert path(rules) == "fused" and path(rules, tokens=4095) == "own"
    known = _native.build_info()["paths"]["sketch"]
    assert known["wanted"] == rules and known["bfloat16"] == "own"
    with pytest.raises(RuntimeError, match="must be auto, own, cublaslt or fused, .*; got fast"):
        path("fast")
    known = _native.build_info()["paths"]["sketch"]
    assert not known["supported"] and known["reason"].endswith("got fast")


def test_a_dtype_that_no_sketch_takes_is_named():
    with pytest.raises(ValueError, match="float32, float64, bfloat16 or float16, got int8"):
        MODULE.sketch_path("int8", 768, 3072, 8192, 32)


def test_which_sketches_the_fused_launch_takes():
    h100, rtx5090 = (132, 228 << 10), (170, 100 << 10)
    assert MODULE.fused_fits(8192, 768, 3072, 32, *h100)
    assert MODULE.fused_fits(8192, 1280, 5120, 32, *h100)
    assert not MODULE.fused_fits(8192, 1280, 5120, 32, *rtx5090)  # too little shared memory
    assert not MODULE.fused_fits(8192, 1280, 5120, 128, *h100)  # too large a rank
    assert not MODULE.fused_fits(8192, 4096, 14336, 32, *h100)  # too wide for a cluster
    assert not MODULE.fused_fits(8192, 1281, 5120, 32, *h100)  # rows start at odd addresses
    assert not MODULE.fused_fits(0, 768, 3072, 32, *h100)


def test_cuda_paths_follow_capability_and_library():
    def supported(capability, cublaslt):
        paths = MODULE.cuda_paths(capability, cublaslt, "90a-real,100,120-real")
        names = ("kernels", "fp8", "grouped", "cublaslt_grouped")
        found = [paths[name]["supported"] for name in names]
        assert found[0] == found[1] == found[2]
        return found[1:]

    assert supported(0, 130400) == [False, False, False]
    assert supported(80, 130400) == supported(89, 130400) == [False, False, False]
    assert supported(90, 130300) == [True, True, False]
    assert supported(90, 130400) == [True, True, True]
    assert supported(100, 130200) == [True, True, True]
    assert supported(120, 130500) == [True, True, False]


@pytest.mark.parametrize(
    "sketch, grouped, words",
    [
        (
            "auto",
            "auto",
            "kernels of ours for layers of bfloat16 and float16 that fit L2 and ranks",
        ),
        ("own", "together", "for layers of bfloat16 and float16 and ranks up to 128, the others"),
        ("cublaslt", "auto", "kernels of ours for layers of float16 that fit L2"),
        ("auto", "single", "one layer at a time (MOLEGRAD_GROUPED_PATH=single)"),
        ("auto", "none", "MOLEGRAD_GROUPED_PATH is none"),
    ],
)
def test_how_layers_are_grouped_is_told(monkeypatch, sketch, grouped, words):
    monkeypatch.setenv("MOLEGRAD_SKETCH_PATH", sketch)
    monkeypatch.setenv("MOLEGRAD_GROUPED_PATH", grouped)
    assert words in MODULE.cuda_paths(90, 130000, "90")["grouped"]["reason"]


@pytest.mark.parametrize(
    "architectures, runs",
    [
        ("90a-real,120-real,120-virtual", {90, 120, 121}),
        ("90", {90, 100, 103, 120, 121}),
        ("90-real", {90}),
        ("90-virtual", {90, 100, 103, 120, 121}),
        ("100-real", {100, 103}),
        ("120a-real", {120}),
        ("native", {90, 100, 103, 120, 121}),
    ],
)
def test_which_gpus_the_kernels_run_on(architectures, runs):
    for capability in (0, 75, 80, 89, 90, 100, 103, 120, 121):
        path = MODULE.cuda_paths(capability, 130000, architectures)["kernels"]
        assert path["supported"] == (capability in runs), capability
    older = MODULE.cuda_paths(89, 130000, architectures)["kernels"]["reason"]
    assert "9.0 or newer" in older and "MOLEGRAD_BUILD=0" in older
    if runs == {120}:
        reason = MODULE.cuda_paths(90, 130000, architectures)["kernels"]["reason"]
        assert reason.startswith("built for 120a-real, not for this GPU") and "=native" in reason
