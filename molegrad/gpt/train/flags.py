"""Command-line flags: one frozen dataclass per command is its flags, their defaults and help texts.

    @dataclass(frozen=True)
    class Config:
        depth: int = flag(4, "number of blocks")

    config = parse(Config, ["--depth=2"])       # the same as make(Config, depth=2)

What: `parse` makes a configuration of `sys.argv`; `make` of values by the names of flags;
`resolved` turns one back into such values, for the run's config.json; `command` makes what is
wrong with a command's input one line of text. A field that is a dataclass itself has a `Group` that
says which flags it stands for (`molegrad.gpt.train.config` has those of MoleGradConfig and of the
health checks), so that neither a default nor a help text is written twice.

Why: every command of the pipeline spells its flags the same way. `--a-b` and `--a_b` are one flag;
a boolean is `--flag=True`, `--flag False`, `--flag` or `--no-flag`.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Sequence

import torch

PREFIX = "streaming_"  # of the flags of estimators
TRACEBACK = "MOLEGRAD_TRACEBACK"  # 1 in the environment: errors of commands come with a traceback
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}

Config = typing.TypeVar("Config")


def flag(default, help: str):
    """A dataclass field that is a flag: its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag; `name` is a Python name."""

    name: str
    hint: object  # its type
    default: object
    help: str


class Group:
    """The flags that a field stands for; `dataclasses.field(metadata={"group": Group()})`.

    renamed: earlier names of flags with the present ones, or "" where there is none.
    """

    renamed: typing.ClassVar[dict[str, str]] = {}

    def flags(self) -> list[Flag]:
        """Its flags, in the order of the help text."""
        raise NotImplementedError

    def build(self, given: dict) -> dict:
        """Fields of the configuration from those flags that were given, by name."""
        raise NotImplementedError

    def values(self, config) -> dict:
        """Flags of `config` by name, from which `build` makes the same fields."""
        raise NotImplementedError


class Prefixed(Group):
    """One flag `<prefix><field>` for every field of a dataclass.

    field: name of the configuration's field that holds an instance of `kind`.
    """

    def __init__(self, field: str, kind: type, prefix: str) -> None:
        self.field, self.kind, self.prefix = field, kind, prefix

    def flags(self) -> list[Flag]:
        return fields_as_flags(self.kind, self.prefix)

    def build(self, given: dict) -> dict:
        values = {name.removeprefix(self.prefix): value for name, value in given.items()}
        return {self.field: self.kind(**values)}

    def values(self, config) -> dict:
        values = dataclasses.asdict(getattr(config, self.field))
        return {self.prefix + name: value for name, value in values.items()}


def fields_as_flags(kind: type, prefix: str = "") -> list[Flag]:
    """The fields of a dataclass as flags; those with a `Group` as the group's."""
    hints, found = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            found += field.metadata["group"].flags()
        elif not field.metadata.get("hidden"):
            text = field.metadata.get("help", "")
            found.append(Flag(prefix + field.name, hints[field.name], field.default, text))
    return found


def _groups(config_class: type) -> list[Group]:
    fields = dataclasses.fields(config_class)
    return [field.metadata["group"] for field in fields if "group" in field.metadata]


def parse(config_class: type[Config], argv: Sequence[str] | None = None, prog=None) -> Config:
    """The command line as an instance of `config_class`.

    Args:
        argv: the arguments without the program name; `sys.argv[1:]` by default.
        prog: the program's name in the help text.

    Raises:
        SystemExit: code 0 after `--help`; code 2 after a message that names the flag and the
            value (and the nearest known flags) when the command line or a value is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = argv[1:] if argv[:1] == ["--"] else argv  # torchrun ... -m scripts.x -- --flags
    prog = prog or f"python -m scripts.{pathlib.Path(sys.argv[0]).stem}"
    known = fields_as_flags(config_class)
    try:
        words = [_dashed(word) for word in argv]
        _refuse_unknown(words, known, _groups(config_class))
        config = make(config_class, **vars(_parser(config_class, known, prog).parse_args(words)))
        _check_machine(config)
        return config
    except (ValueError, TypeError) as error:
        print(f"{prog}: {error}\nFor the flags, run {prog} --help", file=sys.stderr)
        raise SystemExit(2) from error


def make(config_class: type[Config], **given) -> Config:
    """The configuration in which the flags `given` have these values.

    Raises:
        TypeError: there is no such flag.
        ValueError, TypeError: a value is wrong, or two contradict.
    """
    fields: dict = {}
    for group in _groups(config_class):
        own = {f.name: given.pop(f.name) for f in group.flags() if f.name in given}
        fields |= group.build(own) if own else {}
    return config_class(**given, **fields)


def resolved(config) -> dict:
    """The flags of `config` by name, as JSON-able values; `make` gives `config` back."""
    values: dict = {}
    for field in dataclasses.fields(config):
        if "group" in field.metadata:
            values |= field.metadata["group"].values(config)
        elif not field.metadata.get("hidden"):
            values[field.name] = getattr(config, field.name)
    return {name: _plain(value) for name, value in values.items()}


def show(config, title: str = "configuration") -> str:
    """`resolved(config)` as text, one `name  value` line per flag, for the top of a run's log."""
    values = resolved(config)
    width = max((len(name) for name in values), default=0)
    lines = [f"  {name:<{width}}  {json.dumps(value)}" for name, value in values.items()]
    return "\n".join([title, *lines])


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A decorator for a command's main: where its input is wrong (ValueError, OSError,
    NotImplementedError) it prints "NAME: MESSAGE" on stderr and returns 2.

    With MOLEGRAD_TRACEBACK=1 in the environment errors come as they are; where one was raised
    outside of this package, and so may not be about the input, the message says so.
    """

    def wrap(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args, **kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except (ValueError, OSError, NotImplementedError) as error:
                if os.environ.get(TRACEBACK, "0") not in ("", "0"):
                    raise
                hint = "" if _is_ours(error) else f" (where: {TRACEBACK}=1)"
                print(f"{name}: {str(error) or type(error).__name__}{hint}", file=sys.stderr)
                return 2

        return run

    return wrap


def _is_ours(error: Exception) -> bool:
    """Whether this package raised the error itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = pathlib.Path(__file__).resolve().parents[2]
    return trace is not None and package in pathlib.Path(trace.tb_frame.f_code.co_filename).parents


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def _parser(config_class: type, known: list[Flag], prog: str) -> argparse.ArgumentParser:
    """Values of the flags that are given; those that are not have none."""
    summary = (config_class.__doc__ or "").strip().split("\n\n")[0]
    parser = _Parser(
        prog, description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for entry in known:
        name, members = entry.name.replace("_", "-"), _members(entry.hint)
        default = f" (default: {entry.default!r})" if entry.default not in ("", None) else ""
        shared = {"dest": entry.name, "help": (entry.help + default).replace("%", "%%")}
        shared["metavar"] = "{" + ",".join(map(str, _choices(members))) + "}"
        if not _choices(members):
            shared["metavar"] = "|".join(getattr(m, "__name__", "None") for m in members).upper()
        if typing.get_origin(entry.hint) is tuple:
            shared |= {"nargs": len(members), "metavar": None}
        if bool in members:
            shared |= {"nargs": "?", "const": True}
            off = {"action": "store_const", "const": False, "help": argparse.SUPPRESS}
            parser.add_argument(f"--no-{name}", dest=entry.name, **off)
        parser.add_argument(f"--{name}", type=functools.partial(_read, members), **shared)
    return parser


def _members(hint) -> tuple:
    """The types that a value may have."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union or typing.get_origin(hint) is tuple else (hint,)
    return tuple(str if typing.get_origin(member) is tuple else member for member in members)


def _choices(members: tuple) -> list:
    return [
        c for m in members if typing.get_origin(m) is typing.Literal for c in typing.get_args(m)
    ]


def _read(members: tuple, text: str):
    """`text` as a value of the first of the types that it fits."""
    choices = _choices(members)
    if text in choices:
        return text
    if type(None) in members and text.lower() == "none":
        return None
    if bool in members and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    for kind in (int, float, str, pathlib.Path):
        if kind in members:
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = choices or [getattr(m, "__name__", str(m)) for m in members if m is not type(None)]
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, wanted))}")


def _dashed(word: str) -> str:
    """A word of the command line with its flag's name as the parser spells it."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _refuse_unknown(words: list[str], known: list[Flag], groups: list[Group]) -> None:
    """ValueError where a flag is unknown, which names its nearest kin or its present name."""
    names = {entry.name.replace("_", "-") for entry in known} | {"help"}
    renamed = {old: new for group in groups for old, new in group.renamed.items()}
    for word in words:
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or name in names or name.removeprefix("no-") in names:
            continue
        old = name.replace("-", "_")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        if old in renamed:
            near = [renamed[old]] if renamed[old] else []
        hint = f" Perhaps you meant {' or '.join('--' + n for n in near)}." if near else ""
        raise ValueError(f"unknown flag --{old if old in renamed else name}.{hint}")


def _check_machine(config) -> None:
    """ValueError where what a command says of the machine cannot be; torch would say it late."""
    if getattr(config, "threads", 0) < 0:
        raise ValueError(f"threads must not be negative, got {config.threads}")
    for name in ("device", "device_type"):
        value = getattr(config, name, "")
        try:
            if isinstance(value, str) and value:
                torch.device(value)
        except RuntimeError:
            raise ValueError(
                f"{name}={value!r} is no device name: give cpu, cuda, cuda:1 or mps"
            ) from None


def _plain(value):
    """`value` in the types JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    return value
