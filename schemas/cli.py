"""What every command line of this project shares."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from schemas.errors import UserError

Config = TypeVar("Config")


class TerminatedError(Exception):
    """A signal asked to end; the message says how to go on, `status` is that of the exit."""

    def __init__(self, message: str = "", status: int = 143):
        super().__init__(message)
        self.status = status


def run(main: Callable[[], int | None]) -> None:
    """Run a command; a user's mistake is one line on stderr and exit status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except TerminatedError as error:
        print(error, file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # the reader of our output has left; keep Python from writing to it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def lookup(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """`known[name]`. Raises UserError that lists what is known and suggests the nearest name."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown {kind} {name!r}: {hint}there are {', '.join(known)}")


def imported(kind: str, path: str) -> Any:
    """What `module:name` stands for. Raises UserError where there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{kind} {path!r}: {error}; write module:name, the module on PYTHONPATH"
        ) from error


def parse(
    config: type[Config],
    argv: Sequence[str] | None = None,
    named: Mapping[str, Mapping[str, Any]] | None = None,
    by_path: Mapping[str, Callable[[str], Any]] | None = None,
    start: Callable[..., Config] | None = None,
) -> Config:
    """Read a command line into a frozen dataclass of options.

    Args:
        config: a dataclass of options; one that must be given has `tyro.MISSING` for its default.
        argv: the arguments; those of this process by default.
        named: fields that hold one of several named dataclasses, and what the names stand for. The
            name chooses (`--recipe hp`), further options change single values of what was chosen
            (`--recipe.query-ratio 0.1 0.3`).
        by_path: of these, the ones that take `module:name` too, and what makes a choice of it.
        start: makes the defaults of what was chosen by name; `config` itself by default.

    Raises:
        UserError: a name that is not in `named`.
    """
    import tyro  # here, so that what has no command line needs none

    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--version" in arguments:
        print(f"saliency-shards {version('saliency-shards')}")
        sys.exit(0)
    description = [inspect.cleandoc(config.__doc__ or "")]
    chosen = {}
    for field, known in (named or {}).items():
        option = f"--{field.replace('_', '-')}"
        description.append(f"{option} NAME chooses one of: {', '.join(known)}.")
        if (name := take(arguments, option)) is not None:
            make = (by_path or {}).get(field)
            chosen[field] = make(name) if make and ":" in name else lookup(field, name, known)
    return tyro.cli(
        config,
        prog=program(subcommand=argv is not None),
        args=arguments,
        default=(start or config)(**chosen),
        description="\n".join(description),
        config=(tyro.conf.AvoidSubcommands,),
    )


def program(subcommand: bool = False) -> str:
    """The command as it was given: `python -m bench train`, or a script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec and f"python -m {spec.name.removesuffix('.__main__')}"
    words = sys.argv[1:2] if subcommand else []
    return " ".join([module or Path(sys.argv[0]).name, *(w for w in words if w[0] != "-")])


def take(arguments: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from the arguments; the last one given counts."""
    value = None
    position = 0
    while position < len(arguments):
        if arguments[position] == option and position + 1 < len(arguments):
            value = arguments[position + 1]
            del arguments[position : position + 2]
        elif arguments[position].startswith(f"{option}="):
            value = arguments.pop(position).split("=", 1)[1]
        else:
            position += 1
    return value
