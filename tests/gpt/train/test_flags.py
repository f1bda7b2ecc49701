"""Flags: both spellings, booleans in every spelling, generated streaming flags, clear errors."""

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field

import pytest

from molegrad.config import MoleGradConfig
from molegrad.gpt.train import flags


@dataclass(frozen=True)
class Example(flags.StreamingFields):
    """An example command.

    Its second paragraph.
    """

    depth: int = field(default=4, metadata={"help": "number of blocks"})
    max_seq_len: int = 256
    compile: bool = True
    where: pathlib.Path = pathlib.Path("here")

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


def test_dashes_and_underscores_are_one_flag():
    assert flags.parse(Example, ["--max-seq-len", "8"]).max_seq_len == 8
    assert flags.parse(Example, ["--max_seq_len=8"]).max_seq_len == 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--compile=False"], False),
        (["--compile", "false"], False),
        (["--no-compile"], False),
        (["--compile=0"], False),
        (["--compile"], True),
        (["--compile", "--depth", "3"], True),
        (["--compile=True"], True),
        ([], True),
    ],
)
def test_every_spelling_of_a_boolean(words, expected):
    assert flags.parse(Example, words).compile is expected


def test_the_streaming_flags_of_the_readme():
    config = flags.parse(
        Example,
        [
            "--enable_streaming=True",
            "--streaming_rank_k=32",
            "--streaming_power_iters=1",
            "--streaming_target_layers=ffn_only",
            "--streaming_warm_start_decay=0.95",
        ],
    )
    assert config.streaming_config() == MoleGradConfig(
        rank_k=32, power_iters=1, target_layers="ffn_only", warm_start_decay=0.95
    )


@pytest.mark.parametrize(("word", "rank"), [("32", 32), ("0.125", 0.125), ("1e-2", 0.01)])
def test_a_rank_is_a_number_or_a_share(word, rank):
    words = ["--enable_streaming", f"--streaming_rank_k={word}"]
    words += ["--streaming_rank_overrides=attention=16,c_proj=0.25"]
    parsed = flags.parse(Example, words)
    config = parsed.streaming_config()
    assert config.rank_k == rank and type(config.rank_k) is type(rank)
    assert config.rank_overrides == ("attention=16", "c_proj=0.25")
    saved = json.loads(json.dumps(flags.resolved(parsed)))["streaming_rank_k"]
    assert saved == rank and type(saved) is type(rank)


def test_streaming_is_off_unless_asked_for(capsys):
    assert flags.parse(Example, ["--streaming_seed=3"]).streaming_config() is None
    assert flags.parse(Example, ["--streaming_probes=0"]).streaming_config() is None
    for words, phrase in (
        (["--streaming_rank_k=8"], "streaming_rank_k=8 has no effect without --enable_streaming"),
        (
            ["--streaming_method=projected", "--streaming_cond_max=-5"],
            "streaming_method='projected', streaming_cond_max=-5.0 have no effect without",
        ),
        (
            ["--streaming_preset=exact", "--enable_streaming=False"],
            "streaming_preset=exact and enable_streaming=False: drop one of them",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            flags.parse(Example, words)
        assert stopped.value.code == 2
        assert phrase in capsys.readouterr().err


def test_the_dense_twin_of_a_configuration():
    words = ["--streaming_preset=minimal", "--streaming_seed=3", "--depth=2"]
    dense = flags.parse(Example, words).dense()
    assert dense == Example(depth=2, streaming_seed=3) and dense.streaming_config() is None


def test_every_field_of_the_library_is_a_flag_with_its_default_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "An example command." in text and "number of blocks" in text
    for source in dataclasses.fields(MoleGradConfig):
        assert "--streaming-" + source.name.replace("_", "-") in text
        assert getattr(Example(), "streaming_" + source.name) == source.default
    names = {name for name, _, _ in flags.prefixed_fields(MoleGradConfig, "streaming_")}
    assert names == {"streaming_" + f.name for f in dataclasses.fields(MoleGradConfig)}


def test_layer_patterns():
    words = ["--enable_streaming", "--streaming_target_layers=c_fc,attn"]
    assert flags.parse(Example, words).streaming_config().target_layers == ("c_fc", "attn")


def test_a_preset_is_its_flags_and_those_beside_it_win():
    balanced = flags.parse(Example, ["--streaming_preset=balanced"]).streaming_config()
    assert balanced == MoleGradConfig.preset("balanced")
    words = ["--depth=3", "--streaming-preset", "minimal", "--streaming_sample_share=0.5"]
    config = flags.parse(Example, words)
    assert config.depth == 3
    assert config.streaming_config() == MoleGradConfig.preset("minimal", sample_share=0.5)


def test_a_conflict_with_a_preset_says_which_flag_it_stands_for(capsys):
    words = ["--streaming_preset=balanced", "--streaming_method=projected"]
    with pytest.raises(SystemExit):
        flags.parse(Example, words)
    text = capsys.readouterr().err
    assert "sample_overrides='attention=1' has no meaning for method='projected'" in text
    assert "preset=balanced stands for --streaming_sample_overrides=attention=1: a value" in text
    assert "wins, --streaming_sample_overrides= for none" in text
    config = flags.parse(Example, [*words, "--streaming_sample_overrides="]).streaming_config()
    assert (config.method, config.sample_overrides) == ("projected", ())
    with pytest.raises(SystemExit):
        flags.parse(Example, ["--streaming_preset=balanced", "--streaming_rank_k=8"])
    assert "stands for --streaming_method=sampled" in capsys.readouterr().err


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, ["--streaming_preset=best"])
    assert stopped.value.code == 2
    assert "no preset 'best': choose among exact, balanced, minimal" in capsys.readouterr().err


def test_the_separator_that_torchrun_needs():
    assert flags.parse(Example, ["--", "--depth=7"]).depth == 7


def test_an_unknown_flag_is_an_error_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, ["--max-sequence-len", "3"])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "unknown flag --max-sequence-len. Perhaps you meant --max-seq-len" in text
    with pytest.raises(SystemExit):
        flags.parse(Example, ["--depht=3"])
    assert "Perhaps you meant --depth." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--depth=0"], "depth must be at least 1, got 0"),
        (["--depth=three"], "three"),
        (["--compile=maybe"], "maybe"),
        (["--enable_streaming", "--streaming_rank_k=0"], "rank_k must be at least 1, got 0"),
        (["--enable_streaming", "--streaming_rank_k=1.5"], "fraction between 0 and 1"),
        (["--enable_streaming", "--streaming_rank_overrides=ffn"], "PATTERN=RANK is wanted"),
    ],
)
def test_a_wrong_value_is_named(words, phrase, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, words)
    assert stopped.value.code == 2
    assert phrase in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("--device=foo", "device='foo' is no device name: give cpu, cuda, cuda:1 or mps"),
        ("--threads=-2", "threads must not be negative, got -2"),
    ],
)
def test_machines_that_cannot_be(word, phrase, capsys):
    @dataclass(frozen=True)
    class Machine:
        """A command."""

        device: str = ""
        threads: int = 0

    assert flags.parse(Machine, ["--device=cuda:1", "--threads=3"]).device == "cuda:1"
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Machine, [word])
    assert stopped.value.code == 2 and phrase in capsys.readouterr().err


def test_wrong_input_of_a_command_is_one_line(capsys, monkeypatch):
    @flags.command("example")
    def main(error: Exception | None = None) -> int:
        if error is None:
            return 7
        raise error

    @flags.command("example")
    def ours() -> int:
        flags.StreamingFields(streaming_probes=3)

    monkeypatch.delenv("MOLEGRAD_TRACEBACK", raising=False)
    assert main() == 7
    assert ours() == 2
    assert capsys.readouterr().err.endswith("(or a --streaming_preset)\n")
    for error in (ValueError("a"), FileNotFoundError("a"), NotImplementedError("a")):
        assert main(error) == 2
        # Raised by a test, and not by this package: perhaps no fault of the input.
        assert capsys.readouterr().err == "example: a (where: MOLEGRAD_TRACEBACK=1)\n"
    with pytest.raises(RuntimeError):
        main(RuntimeError("a fault of the program"))
    monkeypatch.setenv("MOLEGRAD_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main(ValueError("a"))


def test_resolved_is_json_and_complete():
    words = ["--depth=7", "--enable_streaming", "--streaming_target_layers=a,b"]
    config = flags.parse(Example, words)
    values = json.loads(json.dumps(flags.resolved(config)))
    assert values["depth"] == 7 and values["where"] == "here"
    assert set(values) == {f.name for f in dataclasses.fields(Example)}
    assert "depth" in flags.show(config)
    with pytest.raises(TypeError, match="dataclass instance"):
        flags.resolved(Example)
