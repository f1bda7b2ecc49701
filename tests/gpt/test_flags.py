"""Flags: both spellings, booleans in every spelling, generated streaming flags, clear errors."""

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field

import pytest

from molegrad.config import MoleGradConfig
from molegrad.gpt import flags


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


def test_streaming_is_off_unless_asked_for():
    assert flags.parse(Example, ["--streaming_rank_k=8"]).streaming_config() is None


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
    off = flags.parse(Example, ["--streaming_preset=exact", "--enable_streaming=False"])
    assert off.streaming_config() is None and off.streaming_sample_share == 1.0


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


def test_resolved_is_json_and_complete():
    config = flags.parse(Example, ["--depth=7", "--streaming_target_layers=a,b"])
    values = json.loads(json.dumps(flags.resolved(config)))
    assert values["depth"] == 7 and values["where"] == "here"
    assert set(values) == {f.name for f in dataclasses.fields(Example)}
    assert "depth" in flags.show(config)
    with pytest.raises(TypeError, match="dataclass instance"):
        flags.resolved(Example)
