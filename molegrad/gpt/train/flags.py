"""Command-line flags: one frozen dataclass per command, parsed by tyro.

What: `parse(Config)` turns `sys.argv` into a `Config`; `resolved(config)` turns it back into a
dictionary for the run's config.json; `StreamingFields` is the base class that adds
`--enable_streaming` and one `--streaming_<field>` per field of `MoleGradConfig`;
`HealthFields` adds `--health` and the `--health_<threshold>` flags; `command` makes what is wrong
with a command's input one line of text.

Why: every command of the pipeline spells its flags the same way. `--a-b` and `--a_b` are one flag;
a boolean is `--flag=True`, `--flag False`, `--flag` or `--no-flag`. The streaming flags are
generated from `MoleGradConfig`, so that neither a default nor a help text is written twice.
`--streaming_preset=NAME` stands for --enable_streaming=True and the flags that the preset sets;
those given beside it win.

How to run:

    @dataclass(frozen=True)
    class Config(StreamingFields):
        depth: int = field(default=4, metadata={"help": "number of blocks"})

    config = parse(Config, ["--depth=2", "--enable_streaming=True", "--streaming_rank_k=32"])
    config.streaming_config()   # a MoleGradConfig, or None where streaming is off
"""

import dataclasses
import difflib
import functools
import itertools
import json
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence

import torch
import tyro

from molegrad.config import MoleGradConfig, preset_fields
from molegrad.estimators import methods
from molegrad.monitor.health import DEFAULT_ACTIONS, KINDS
from molegrad.monitor.rules import HealthThresholds

PREFIX = "streaming_"
HEALTH_PREFIX = "health_"
TRACEBACK = "MOLEGRAD_TRACEBACK"  # 1 in the environment: errors of commands come with a traceback
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})

Config = typing.TypeVar("Config")


def flag(default, help: str):
    """A dataclass field that is a flag: its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse(config_class: type[Config], argv: Sequence[str] | None = None, prog=None) -> Config:
    """The command line as an instance of `config_class`.

    Args:
        config_class: a (frozen) dataclass; a field's help is its `metadata["help"]` or docstring.
        argv: the arguments without the program name; `sys.argv[1:]` by default.
        prog: the program's name in the help text.

    Raises:
        SystemExit: code 0 after `--help`; code 2 after a message that names the flag and the
            value (and the nearest known flags) when the command line or a value is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = argv[1:] if argv[:1] == ["--"] else argv  # torchrun ... -m scripts.x -- --flags
    prog = prog or f"python -m scripts.{pathlib.Path(sys.argv[0]).stem}"
    _refuse_unknown(argv, config_class, prog)
    note: Callable[[str], str] = lambda error: ""  # noqa: E731
    try:
        argv, note = _expand_preset(argv, config_class)
        arguments = _spell_booleans(argv, _boolean_flags(config_class))
        read = tyro.cli(
            _unchecked(config_class),
            args=arguments,
            prog=prog,
            description=_summary(config_class),
            config=(tyro.conf.FlagConversionOff,),
        )
        names = [field.name for field in dataclasses.fields(config_class) if field.init]
        config = config_class(**{name: getattr(read, name) for name in names})
        _check_machine(config)
        return config
    except (ValueError, TypeError) as error:
        told = f"{prog}: {error}{note(str(error))}\nFor the flags, run {prog} --help"
        print(told, file=sys.stderr)
        raise SystemExit(2) from error


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
    package = pathlib.Path(__file__).resolve().parents[1]
    return trace is not None and package in pathlib.Path(trace.tb_frame.f_code.co_filename).parents


def resolved(config) -> dict:
    """Every field of `config` (a dataclass instance) as JSON-able values, nested ones included."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"resolved() wants a dataclass instance, not {config!r}")
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def show(config, title: str = "configuration") -> str:
    """`resolved(config)` as text, one `name  value` line per field, for the top of a run's log."""
    values = resolved(config)
    width = max((len(name) for name in values), default=0)
    lines = [f"  {name:<{width}}  {json.dumps(value)}" for name, value in values.items()]
    return "\n".join([title, *lines])


def prefixed_fields(source_class, prefix: str) -> list[tuple[str, object, dataclasses.Field]]:
    """(name, type, field) of `<prefix><field>` for every field of a dataclass."""
    hints = typing.get_type_hints(source_class)
    entries = []
    for source in dataclasses.fields(source_class):
        given = {}
        if source.default is not dataclasses.MISSING:
            given["default"] = source.default
        elif source.default_factory is not dataclasses.MISSING:
            given["default_factory"] = source.default_factory
        field = dataclasses.field(**given, metadata=dict(source.metadata))
        entries.append((prefix + source.name, hints[source.name], field))
    return entries


def _gathered(self, source_class, prefix: str):
    """The instance of `source_class` that the flags of `prefixed_fields` describe."""
    names = [source.name for source in dataclasses.fields(source_class)]
    return source_class(**{name: getattr(self, prefix + name) for name in names})


def _streaming_entries() -> list[tuple[str, object, dataclasses.Field]]:
    """Flags of MoleGradConfig's own fields and of the estimators' options, side by side."""
    method = (PREFIX + "method", str | None, flag(None, "estimator: " + ", ".join(methods())))
    entries = {method[0]: method}
    for kind in (MoleGradConfig, *(kind for kind, _ in methods().values())):
        for entry in prefixed_fields(kind, PREFIX):
            entries.setdefault(entry[0], entry)
    del entries[PREFIX + "estimator"]
    return list(entries.values())


def _streaming_config(self) -> MoleGradConfig | None:
    """The `MoleGradConfig` these flags describe, or None where `enable_streaming` is False."""
    if not self.enable_streaming:
        return None
    method = self.streaming_method or "power"
    kind = methods().get(method, (MoleGradConfig,))[0]
    own = {f.name for f in (*dataclasses.fields(MoleGradConfig), *dataclasses.fields(kind))}
    given = {
        name.removeprefix(PREFIX): getattr(self, name)
        for name, _, field in _streaming_entries()
        if name.removeprefix(PREFIX) in own or getattr(self, name) != field.default
    }
    return MoleGradConfig.of(**{**given, "method": method})


def _validate_streaming(self) -> None:
    """Wrong streaming values are found where the flags are parsed, not where layers are made."""
    self.streaming_config()
    if self.enable_streaming:
        return
    values = {field.name: getattr(self, PREFIX + field.name) for field in _resettable()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}  # of JSON
    idle = [
        f"{PREFIX}{field.name}={values[field.name]!r}"
        for field in _resettable()
        if values[field.name] != field.default
    ]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect without "
            "--enable_streaming=True (or a --streaming_preset)"
        )


def _resettable() -> list[dataclasses.Field]:
    """Fields of `MoleGradConfig` without meaning where streaming is off: all but the seed, which
    runs that are to be compared share."""
    fields = []
    for name, _, field in _streaming_entries():
        field.name = name.removeprefix(PREFIX)
        fields.append(field)
    return [field for field in fields if field.name != "seed"]


def _dense(self):
    """The same configuration without streaming: its flags at their defaults, but for the seed."""
    defaults = {PREFIX + field.name: field.default for field in _resettable()}
    return dataclasses.replace(self, enable_streaming=False, **defaults)


StreamingFields = dataclasses.make_dataclass(
    "StreamingFields",
    [
        (
            "enable_streaming",
            bool,
            dataclasses.field(
                default=False,
                metadata={"help": "estimated weight gradients (MoleGrad) in the target layers"},
            ),
        ),
        *_streaming_entries(),
    ],
    frozen=True,
    namespace={
        "__doc__": "Base class: `--enable_streaming` and the `--streaming_<field>` flags.",
        "__module__": __name__,
        "streaming_config": _streaming_config,
        "dense": _dense,
        "__post_init__": _validate_streaming,
    },
)


def _health_thresholds(self) -> HealthThresholds:
    """The thresholds of the health checks that these flags describe."""
    return _gathered(self, HealthThresholds, HEALTH_PREFIX)


HealthFields = dataclasses.make_dataclass(
    "HealthFields",
    [
        (
            "health",
            str,
            flag(
                "default",
                "what a health finding leads to: off, warn, reset (the layer's bases) or raise, "
                f"for all of {', '.join(KINDS)} or single ones (frozen=reset,nan=raise); default "
                f"is {','.join(f'{kind}={action}' for kind, action in DEFAULT_ACTIONS.items())}",
            ),
        ),
        *prefixed_fields(HealthThresholds, HEALTH_PREFIX),
    ],
    frozen=True,
    namespace={
        "__doc__": "Base class: `--health` and the `--health_<threshold>` flags.",
        "__module__": __name__,
        "health_thresholds": _health_thresholds,
    },
)


def _unchecked(config_class: type) -> type:
    """The dataclass without its checks: tyro would break their messages into a box."""
    body = {"__post_init__": lambda self: None, "__module__": config_class.__module__}
    return type(config_class.__name__, (config_class,), {**body, "__doc__": config_class.__doc__})


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


def _summary(config_class) -> str:
    """First paragraph of the class's docstring: the text on top of `--help`."""
    return (config_class.__doc__ or "").strip().split("\n\n")[0]


def _plain(value):
    """`value` in the types JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return resolved(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return str(value)
    return value


def _expand_preset(argv: list[str], config_class) -> tuple[list[str], Callable[[str], str]]:
    """`--streaming_preset=NAME` as the flags it stands for, those left out that are given too; and
    what to add to an error message about one of them."""
    if not issubclass(config_class, StreamingFields):
        return argv, lambda error: ""
    rest, name, words = [], None, iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == "--streaming-preset":
            name = value if equals else next(words, "")
        else:
            rest.append(word)
    if name is None:
        return argv, lambda error: ""
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest}
    fields = {PREFIX + field: value for field, value in preset_fields(name).items()}
    spelt = _spell_booleans(rest, {"enable-streaming"})
    if ("--enable-streaming", "False") in itertools.pairwise(spelt):
        raise ValueError(f"streaming_preset={name} and enable_streaming=False: drop one of them")
    fields = {"enable_streaming": True, **fields}
    words = [(k, ",".join(v) if isinstance(v, tuple) else v) for k, v in fields.items()]
    added = {field: f"--{field}={value}" for field, value in words if field not in given}

    def note(error: str) -> str:
        named = [f for f in added if re.search(rf"\b({PREFIX})?{f.removeprefix(PREFIX)}=", error)]
        if not named:
            return ""
        emptied = [f"--{f}=" for f in named if isinstance(fields[f], tuple)]
        empty = f", {' '.join(emptied)} for none" if emptied else ""
        return (
            f"\n--streaming_preset={name} stands for {' '.join(added[f] for f in named)}: "
            f"a value given beside it wins{empty}"
        )

    return [*added.values(), *rest], note


def _refuse_unknown(argv: list[str], config_class, prog: str) -> None:
    """Exit with code 2 where a flag is no field of `config_class`, naming its nearest kin."""
    hints = typing.get_type_hints(config_class)
    fields = [field.name for field in dataclasses.fields(config_class)]
    if any(dataclasses.is_dataclass(hints[name]) for name in fields):
        return  # nested flags have names that only tyro knows
    booleans = _boolean_flags(config_class)
    known = {name.replace("_", "-") for name in fields} | {"help"}
    if issubclass(config_class, StreamingFields):
        known.add("streaming-preset")
    for word in argv:
        name = word[2:].partition("=")[0].replace("_", "-")
        if not word.startswith("--") or name in known or name.removeprefix("no-") in booleans:
            continue
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f" Perhaps you meant {' or '.join('--' + n for n in near)}." if near else ""
        print(
            f"{prog}: unknown flag --{name}.{hint} For the flags, run {prog} --help",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _boolean_flags(config_class) -> set[str]:
    """Flags (spelt with dashes, without the leading ones) whose value is a boolean."""
    hints = typing.get_type_hints(config_class)
    names = set()
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if union else (hint,)
        if bool in members:
            names.add(field.name.replace("_", "-"))
    return names


def _spell_booleans(argv: list[str], booleans: set[str]) -> list[str]:
    """`argv` with every boolean in the one spelling tyro takes: `--flag True` or `--flag False`."""
    out, i = [], 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-")
        if not equals and name.startswith("no-") and name[3:] in booleans:
            out += ["--" + name[3:], "False"]
        elif name not in booleans:
            out.append(word)
        else:
            if not equals:
                stated = i < len(argv) and argv[i].lower() in _TRUE | _FALSE
                value = argv[i] if stated else "True"
                i += stated
            known = {**dict.fromkeys(_TRUE, "True"), **dict.fromkeys(_FALSE, "False")}
            out += ["--" + name, known.get(value.lower(), value)]
    return out
