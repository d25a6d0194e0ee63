"""Parse options by tyro; report wrong, unknown and missing ones in one line."""

import dataclasses
import difflib
import inspect
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from schemas.errors import UserError

Config = TypeVar("Config")

BORDER = re.compile(r"\x1b\[[\d;]*m|[│╭╮╰╯]")
WRONG_VALUE = re.compile(
    r"(?:Error parsing|invalid choice|Missing value) .+?(?= Got errors:| [─-]{20}|$)"
)
"""The part of tyro's box of several lines that says what is wrong with a value."""

WIDE = "10000"
"""Columns of a terminal in whose width tyro does not break such a line, or a long value in it."""


PATHS = ConstructorRegistry()
"""How tyro reads options that are paths."""

LOCAL_PATH = "a path of this machine; only datasets may be URLs"


@PATHS.primitive_rule
def read_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read a `Path`, and refuse a URL, of which pathlib would make a folder `s3:`."""

    def convert(words: list[str]) -> Path:
        if "://" in words[0]:
            raise ValueError(f"{words[0]} must be {LOCAL_PATH}")
        return Path(words[0])

    if info.type not in (Path, Path | None):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=convert,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def parse_options(
    program: str,
    arguments: Sequence[str],
    config: type[Config],
    defaults: Config,
    shown: Mapping[str, tuple[str, str]],
) -> Config:
    """Parse arguments into a dataclass of options, or print help and exit.

    Args:
        program: the command as messages name it.
        defaults: the values of options that are not given; a required option is `tyro.MISSING`.
        shown: options that only the help shows, because they are not in the arguments any more:
            their names -> metavar and help text.

    Raises:
        UserError: a value that its option cannot have, an unknown option or argument, or a required
            one is missing.
    """
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in arguments):
        return call_tyro(program, arguments, config, defaults, shown)[0]
    stand_ins = {name: make_stand_in(hint) for name, hint in list_required(defaults).items()}
    filled = dataclasses.replace(defaults, **stand_ins)  # type: ignore[type-var]
    with translate_wrong_values(program):
        options, unknown = call_tyro(program, arguments, config, filled, shown)
    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    problems = []
    if unknown:
        names = read_option_names(program, config, defaults, shown)
        problems.append(describe_unknown(unknown, names))
    missing = [
        get_usage(name, hint)
        for name, hint in list_required(defaults).items()
        if getattr(options, name) == stand_ins[name] and get_usage(name, hint) not in given
    ]
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if problems:
        raise UserError(f"{program}: {'; '.join(problems)}; see {program} --help")
    return options


def call_tyro(
    program: str,
    arguments: Sequence[str],
    config: type[Config],
    defaults: Config,
    shown: Mapping[str, tuple[str, str]],
) -> tuple[Config, list[str]]:
    """Return the options, and the arguments that tyro does not know."""
    extra = [
        (f"shown_{number}", Annotated[str | None, build_argument(name, metavar, text)], None)
        for number, (name, (metavar, text)) in enumerate(shown.items())
    ]
    parts: Any = dataclasses.make_dataclass(
        config.__name__, [("options", Annotated[config, tyro.conf.arg(name="")]), *extra]
    )
    parsed, unknown = tyro.cli(
        parts,
        prog=program,
        args=arguments,
        default=parts(options=defaults),
        description=inspect.cleandoc(config.__doc__ or ""),
        config=(tyro.conf.AvoidSubcommands,),
        registry=PATHS,
        return_unknown_args=True,
    )
    return parsed.options, unknown


@contextmanager
def translate_wrong_values(program: str) -> Iterator[None]:
    """Turn tyro's box about a wrong value into a one-line error; pass everything else on.

    Raises:
        UserError: tyro refuses a value.
    """
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), override_columns(WIDE):
            yield
    except SystemExit as stop:
        words = " ".join(BORDER.sub("", printed.getvalue()).split())
        if problem := WRONG_VALUE.search(words):
            printed = io.StringIO()
            text = problem[0].removeprefix("Error parsing ").rstrip(" .")
            text = text[0].lower() + text[1:]
            raise UserError(f"{program}: {text}; see {program} --help") from stop
        raise
    finally:
        if sys.stderr is not None:
            sys.stderr.write(printed.getvalue())


@contextmanager
def override_columns(columns: str) -> Iterator[None]:
    """Override the width of the terminal, which programs take from COLUMNS if that is set."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = columns
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def build_argument(name: str, metavar: str, text: str) -> Any:
    """Return the description of an option that only the help shows."""
    return tyro.conf.arg(name=name, metavar=metavar, help=text, help_behavior_hint="")


def list_required(defaults: Any) -> dict[str, Any]:
    """Return the type hints of options without a default, by name."""
    hints = get_type_hints(type(defaults), include_extras=True)
    return {name: hint for name, hint in hints.items() if is_missing(getattr(defaults, name))}


def is_missing(value: Any) -> bool:
    return value is tyro.MISSING


def make_stand_in(hint: Any) -> Any:
    """Return a value that stands in for a required option while the others are parsed."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return (get_origin(kind) or kind)()


def get_usage(name: str, hint: Any) -> str:
    """Return how a user gives an option: `--test-data`, or `RUNS` for a positional argument."""
    if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
        return name.upper()
    return f"--{name.replace('_', '-')}"


def read_option_names(
    program: str, config: type[Config], defaults: Config, shown: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Return the names of all options, without dashes, from the help."""
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        call_tyro(program, ["--help"], config, defaults, shown)
    return re.findall(r"--([a-z][\w.-]*)", text.getvalue())


def describe_unknown(unknown: Sequence[str], names: Sequence[str]) -> str:
    """Describe the arguments that are not known; name the nearest option of each."""
    options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not options:
        return f"unexpected argument {shlex.join(unknown)}"
    parts = []
    for option in options:
        near = difflib.get_close_matches(option.lstrip("-"), names, n=1)
        parts.append(f"unknown option {option}{f' (did you mean --{near[0]}?)' if near else ''}")
    return ", ".join(parts)
