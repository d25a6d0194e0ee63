"""What every command line of this project shares."""

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar, cast

from schemas.decoder_noise import without_decoder_noise
from schemas.errors import UserError

Config = TypeVar("Config")


class TerminatedError(Exception):
    """A signal asked to end; the message says how to go on, `status` is that of the exit."""

    def __init__(self, message: str = "", status: int = 143):
        super().__init__(message)
        self.status = status


class LastingStream:
    """A text stream for a job that outlives who reads what it says: `| head`, a closed terminal.

    The first write that fails is told on `other`, if that is possible; later ones are lost.
    """

    def __init__(self, stream: TextIO, other: TextIO | None = None):
        self.stream, self.other, self.lost = stream, other, False

    def write(self, text: str) -> int:
        if not self.lost:
            try:
                return self.stream.write(text)
            except OSError as error:
                self.lose(error)
        return len(text)

    def flush(self) -> None:
        if not self.lost:
            try:
                self.stream.flush()
            except OSError as error:
                self.lose(error)

    def lose(self, error: OSError) -> None:
        """Send what is written from now on, and what is still in the buffer, nowhere."""
        self.lost = True
        discard(self.stream)
        if self.other is not None:
            with contextlib.suppress(OSError):
                print(f"the output is closed ({error.strerror}); the job goes on", file=self.other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def discard(stream: TextIO) -> None:
    """Let a stream's file descriptor lead nowhere, so that Python's flush at its end succeeds."""
    with contextlib.suppress(OSError, ValueError):  # one of a test has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let stdout and stderr outlive their readers within the block; closed ones lead nowhere."""
    before = sys.stdout, sys.stderr
    errors = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  as long as the process
    output = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = cast(TextIO, LastingStream(errors))
    sys.stdout = cast(TextIO, LastingStream(output, errors))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def run(
    main: Callable[[], int | None], outlives_reader: bool = False, decodes: bool = False
) -> None:
    """Run a command; a user's mistake is one line on stderr and exit status 2.

    Args:
        outlives_reader: for a job whose result is not what it prints: it goes on when stdout or
            stderr is closed. Other commands end with status 141, as programs in pipes do.
        decodes: for a command that decodes images: see `decoder_noise`.
    """
    with contextlib.ExitStack() as stack:
        if decodes:
            stack.enter_context(without_decoder_noise())
        if outlives_reader:
            stack.enter_context(lasting_output())
        status = status_of(main)
    sys.exit(status)


def complain(text: str) -> None:
    """Print a line on stderr, if anybody reads it: the exit status says that something is wrong."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)


def status_of(main: Callable[[], int | None]) -> int | None:
    """The exit status of a command; what the user must know is said on stderr."""
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()  # at Python's end it would be too late to answer
        return status
    except UserError as error:
        complain(f"error: {error}")
        status = 2
    except TerminatedError as error:
        complain(str(error))
        status = error.status
    except KeyboardInterrupt:
        complain("interrupted; the same command again goes on from here")
        status = 130
    except BrokenPipeError:
        # the reader of our output has left; keep Python from writing to it once more at exit
        discard(sys.stdout)
        status = 141
    return status


def lookup(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """`known[name]`. Raises UserError that lists what is known and suggests the nearest name."""
    if name in known:
        return known[name]
    if name.endswith(".py"):
        raise UserError(f"{kind} {name!r}: say which of its names is meant, {name}:NAME")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown {kind} {name!r}: {hint}there are {', '.join(known)}")


def imported(kind: str, path: str) -> Any:
    """Return what `module:name` or `FILE.py:name` stands for.

    Raises:
        UserError: there is no such module, file or name, or the file is no Python.
    """
    module, _, name = path.rpartition(":")
    try:
        found = load_file(module) if is_file_name(module) else import_module(module)
        return getattr(found, name)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"{kind} {path!r}: {error}; write FILE.py:name, or module:name with the module on "
            "PYTHONPATH"
        ) from error
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{kind} {path!r}: no Python ({place}: {error.msg})") from error


FILE_MODULE = "saliency_shards_file_"
"""What the names of modules begin with that were loaded by their file."""


def is_file_name(module: str) -> bool:
    return module.endswith(".py") or "/" in module


def load_file(path: str) -> ModuleType:
    """Import a Python file by its path, once in a process, whatever else has its name.

    The file's folder is put last on `sys.path`, so that it may import its neighbors.
    """
    place = os.path.realpath(path)
    for module in list(sys.modules.values()):
        if (file := getattr(module, "__file__", None)) and os.path.realpath(file) == place:
            return module
    stem = re.sub(r"\W", "_", Path(place).stem)
    name = f"{FILE_MODULE}{stem}_{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = os.path.dirname(place)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def loaded_files() -> list[ModuleType]:
    """The modules that were loaded by their file: other processes cannot import them by name."""
    return [module for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]


def name_by_import(thing: type | Callable) -> str:
    """Return what `imported` finds a class or function by, wherever the process runs."""
    module = thing.__module__
    place = sys.modules[module].__file__ if module.startswith(FILE_MODULE) else module
    return f"{place}:{thing.__qualname__}"


def absolute(path: str) -> str:
    """Return `FILE.py:name` with the file's whole path; anything else as it is."""
    module, _, name = path.rpartition(":")
    return f"{os.path.realpath(module)}:{name}" if is_file_name(module) else path


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
        by_path: of these, the ones that take `module:name` or `FILE.py:name` too, and what makes a
            choice of it.
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
