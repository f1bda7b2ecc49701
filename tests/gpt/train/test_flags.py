"""Flags: both spellings, booleans in every spelling, groups of flags, clear errors."""

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Literal

import pytest

from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag


@dataclass(frozen=True)
class Limits:
    least: float = flag(0.5, "the least")

    def __post_init__(self):
        if self.least < 0:
            raise ValueError(f"least must not be negative, got {self.least}")


class Limited(flags.Prefixed):
    renamed = {"limit_lowest": "limit_least", "limit_gone": ""}


@dataclass(frozen=True)
class Example:
    """An example command.

    Its second paragraph.
    """

    depth: int = flag(4, "number of blocks, 100% of them")
    max_seq_len: int = 256
    compile: bool | None = True
    kind: Literal["plain", "odd"] = "plain"
    rank: int | float | None = None
    names: str | tuple[str, ...] = ()
    pair: tuple[float, float] = (1.0, 2.0)
    where: pathlib.Path = pathlib.Path("here")
    device: str = ""
    limits: Limits = field(
        default=Limits(), metadata={"group": Limited("limits", Limits, "limit_")}
    )
    note: str = field(default="", metadata={"hidden": True})

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max-seq-len", "8"], "max_seq_len", 8),
        (["--max_seq_len=8"], "max_seq_len", 8),
        (["--", "--depth=7"], "depth", 7),  # the separator that torchrun needs
        (["--compile=False"], "compile", False),
        (["--compile", "false"], "compile", False),
        (["--no-compile"], "compile", False),
        (["--compile=0"], "compile", False),
        (["--compile", "--depth", "3"], "compile", True),
        (["--compile=None"], "compile", None),
        (["--rank=32"], "rank", 32),
        (["--rank=1e-2"], "rank", 0.01),
        (["--rank=none"], "rank", None),
        (["--names=a,b"], "names", "a,b"),
        (["--pair", "3", "4.5"], "pair", [3.0, 4.5]),
        (["--where=there"], "where", pathlib.Path("there")),
        (["--depth=7", "--depth=9"], "depth", 9),
        (["--limit_least=0.25"], "limits", Limits(0.25)),
        ([], "limits", Limits()),
    ],
)
def test_every_spelling_and_type(words, name, value):
    found = getattr(flags.parse(Example, words), name)
    assert found == value and type(found) is type(value)


def test_help_has_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "An example command.",
        "number of blocks, 100% of them (default: 4)",
        "--limit-least",
        "the least (default: 0.5)",
        "{plain,odd}",
    ):
        assert phrase in text
    assert "--note" not in text and "second paragraph" not in text


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--depth=0"], "depth must be at least 1, got 0"),
        (["--depth=three"], "'three' is not one of int"),
        (["--kind=even"], "'even' is not one of plain, odd"),
        (["--compile=perhaps"], "'perhaps' is not one of"),
        (["--limit_least=-1"], "least must not be negative, got -1"),
        (["--max-sequence-len", "3"], "unknown flag --max-sequence-len. Perhaps you meant --max-"),
        (["--depht=3"], "Perhaps you meant --depth."),
        (["--dep=3"], "unknown flag --dep"),
        (["--limit-lowest=3"], "unknown flag --limit_lowest. Perhaps you meant --limit_least."),
        (["--limit_gone=3"], "unknown flag --limit_gone. For"),
        (["stray"], "stray"),
        (["--device=toaster"], "device='toaster' is no device name"),
    ],
)
def test_what_is_wrong_is_named_and_ends_with_code_2(words, phrase, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse(Example, words, prog="python -m scripts.example")
    assert stopped.value.code == 2
    text = capsys.readouterr().err.replace("\n", " ")
    assert phrase in text and "run python -m scripts.example --help" in text


def test_resolved_flags_make_the_same_configuration():
    config = flags.make(Example, depth=2, limit_least=0.75, where=pathlib.Path("x"), note="n")
    values = flags.resolved(config)
    assert values["limit_least"] == 0.75 and values["where"] == "x" and "note" not in values
    again = flags.make(Example, **{**values, "pair": tuple(values["pair"]), "names": ()})
    assert dataclasses.replace(again, where=config.where, note="n") == config
    with pytest.raises(TypeError, match="wrong"):
        flags.make(Example, wrong=1)
    assert "  depth        2\n" in flags.show(config)


def test_a_commands_error_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv(flags.TRACEBACK, raising=False)

    @flags.command("example")
    def main(error):
        raise error

    assert main(ValueError("depth is wrong")) == 2
    assert capsys.readouterr().err == f"example: depth is wrong (where: {flags.TRACEBACK}=1)\n"
    assert main(OSError()) == 2
    assert capsys.readouterr().err.startswith("example: OSError")
    with pytest.raises(KeyError):
        main(KeyError("x"))
    monkeypatch.setenv(flags.TRACEBACK, "1")
    with pytest.raises(ValueError, match="depth is wrong"):
        main(ValueError("depth is wrong"))


def test_an_error_of_this_package_has_no_hint(capsys):
    @flags.command("example")
    def main():
        flags.make(flags.Prefixed, x=1)

    with pytest.raises(TypeError):
        main()

    @flags.command("example")
    def ours():
        flags._check_machine(Example(device="toaster"))

    assert ours() == 2 and "(where:" not in capsys.readouterr().err
