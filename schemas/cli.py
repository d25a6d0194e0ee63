"""Helpers shared by every command line of this project."""

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, TypeVar, cast

from schemas.decoder_noise import without_decoder_noise
from schemas.errors import UserError
from schemas.versions import version_of

Config = TypeVar("Config")


class TerminatedError(Exception):
    """A signal asked the process to end: `message` says how to resume, `status` is for the exit."""

    def __init__(self, message: str = "", status: int = 143):
        super().__init__(message)
        self.status = status


class LastingStream:
    """A text stream for a job that outlives the reader of its output: `| head`, a closed terminal.

    The first write that fails is reported on `fallback`, if that is possible; later ones are
    dropped.
    """

    def __init__(self, stream: TextIO, fallback: TextIO | None = None):
        self.stream, self.fallback, self.lost = stream, fallback, False

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
        """Drop what is written from now on, and what is still in the buffer."""
        self.lost = True
        discard(self.stream)
        if self.fallback is not None:
            with contextlib.suppress(OSError):
                reason = error.strerror
                print(f"the output is closed ({reason}); the command continues", file=self.fallback)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def discard(stream: TextIO) -> None:
    """Redirect a stream's descriptor to the null device, so that Python's final flush succeeds."""
    with contextlib.suppress(OSError, ValueError):  # streams of tests may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Keep the process alive in the block when the readers of stdout and stderr leave.

    A stream that is closed from the start is replaced by the null device.
    """
    before = sys.stdout, sys.stderr
    errors = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  open until exit
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
    main: Callable[[], int | None],
    outlives_reader: bool = False,
    decodes: bool = False,
    resumes: bool = False,
) -> None:
    """Run a command; a user error becomes one line on stderr and exit status 2.

    Args:
        outlives_reader: True for a job whose result is not what it prints: it continues when stdout
            or stderr is closed. Other commands end with status 141, as programs in pipes do.
        decodes: True for a command that decodes images: see `decoder_noise`.
        resumes: True for a command that continues its earlier work when it is run again; an
            interruption (Ctrl-C) then says so.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders need not be UTF-8
    with contextlib.ExitStack() as stack:
        if decodes:
            stack.enter_context(without_decoder_noise())
        if outlives_reader:
            stack.enter_context(lasting_output())
        status = get_status(main, resumes)
    sys.exit(status)


def complain(text: str) -> None:
    """Print a line on stderr if it is open; the exit status reports the error in any case."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)


def get_status(main: Callable[[], int | None], resumes: bool = False) -> int | None:
    """Run a command and return its exit status; print on stderr what the user must know."""
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()  # Python's own flush at exit comes too late to be handled
        return status
    except UserError as error:
        complain(f"error: {error}")
        status = 2
    except TerminatedError as error:
        complain(str(error))
        status = error.status
    except KeyboardInterrupt:
        complain(f"interrupted{'; run the same command again to resume' * resumes}")
        status = 130
    except BrokenPipeError:
        # The reader of the output has left; keep Python from writing to it once more at exit.
        discard(sys.stdout)
        status = 141
    return status


def lookup(kind: str, name: str, choices: Mapping[str, Any]) -> Any:
    """Return `choices[name]`. Raises UserError with the valid names and the nearest one."""
    if name in choices:
        return choices[name]
    if name.endswith(".py"):
        raise UserError(f"{kind} {name!r}: add the name of the object in it, {name}:NAME")
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown {kind} {name!r}: {hint}there are {', '.join(choices)}")


def import_object(kind: str, path: str) -> Any:
    """Import the object that `module:name` or `FILE.py:name` refers to.

    Raises:
        UserError: there is no such module, file or name, or the file is not valid Python.
    """
    module, _, name = path.rpartition(":")
    try:
        loaded = load_file(module) if is_file_name(module) else import_module(module)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise UserError(
            f"{kind} {path!r}: {error}; write FILE.py:name, or module:name with the module on "
            "PYTHONPATH"
        ) from error
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"{kind} {path!r}: not valid Python ({place}: {error.msg})") from error
    try:
        return getattr(loaded, name)
    except AttributeError:
        if not name:
            raise UserError(f"{kind} {path!r}: write {module}:NAME") from None
        near = difflib.get_close_matches(name, vars(loaded), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{kind} {path!r}: {module} defines no {name}{hint}") from None


def digest_source(kind: str, path: str) -> str:
    """Return the sha256 of the source of the module that `import_object` finds.

    Raises:
        UserError: `import_object` raises it, there is no source, or it has changed since the first
            call for this path: this process still has the functions of the source before.
    """
    target = import_object(kind, path)
    try:
        source = inspect.getsource(inspect.getmodule(target) or target)
    except (TypeError, OSError) as error:
        raise UserError(f"{kind} {path!r}: {error}") from error
    digest = hashlib.sha256(source.encode()).hexdigest()
    if FIRST_DIGESTS.setdefault(make_absolute(path), digest) != digest:
        raise UserError(
            f"{kind} {path!r}: the file has changed since this process loaded it; restart Python "
            "to use the new one"
        )
    return digest


FIRST_DIGESTS: dict[str, str] = {}
"""Digests that `digest_source` has returned, by path."""


FILE_MODULE = "saliency_shards_file_"
"""Prefix of the names of modules that were loaded from a file path."""


def is_file_name(module: str) -> bool:
    return module.endswith(".py") or "/" in module


def load_file(path: str) -> ModuleType:
    """Import a Python file by its path, once per process, even if another module has its name.

    The file's folder is appended to `sys.path`, so that the file can import its neighbors.
    """
    return load_place(os.path.realpath(path))


@cache
def load_place(place: str) -> ModuleType:
    """Import the Python file at this real path. Looking through all modules takes 0.2 s."""
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


def list_loaded_files() -> list[ModuleType]:
    """Return the modules loaded from a path; other processes cannot import them by name."""
    return [module for name, module in sys.modules.items() if name.startswith(FILE_MODULE)]


def name_by_import(target: type | Callable) -> str:
    """Return the string by which `import_object` finds a class or function in any process."""
    module = target.__module__
    place = sys.modules[module].__file__ if module.startswith(FILE_MODULE) else module
    return f"{place}:{target.__qualname__}"


def make_absolute(path: str) -> str:
    """Return `FILE.py:name` with the file's absolute path; return anything else unchanged."""
    module, _, name = path.rpartition(":")
    return f"{os.path.realpath(module)}:{name}" if is_file_name(module) else path


def parse(
    config: type[Config],
    argv: Sequence[str] | None = None,
    named: Mapping[str, Mapping[str, Any]] | None = None,
    by_path: Mapping[str, Callable[[str], Any]] | None = None,
    start: Callable[..., Config] | None = None,
    shown: Mapping[str, tuple[str, str]] | None = None,
) -> Config:
    """Parse a command line into a frozen dataclass of options.

    Args:
        config: a dataclass of options; a required field has `tyro.MISSING` as its default.
        argv: the arguments; by default those of this process.
        named: fields that hold one of several named dataclasses, and the mapping from the names to
            them. The name chooses (`--recipe hp`), further options change single values of the
            choice (`--recipe.query-ratio 0.1 0.3`).
        by_path: those of the `named` fields that also accept `module:name` or `FILE.py:name`, and
            the function that turns such a string into a choice.
        start: builds the defaults from the choices made by name; by default `config` itself.
        shown: options that the caller has already taken from the arguments: their names -> metavar
            and help text.

    Raises:
        UserError: a name that is not in `named`; an unknown option, or a required one is missing.
    """
    from schemas.parser import parse_options  # the rest of this module works without tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--version" in arguments:
        print_version()
        sys.exit(0)
    chosen, texts = {}, dict(shown or {})
    for field, choices in (named or {}).items():
        make = (by_path or {}).get(field)
        own = ", or one of your own as FILE.py:NAME" if make else ""
        texts[field] = "NAME", f"Name of the {field}: {', '.join(choices)}{own}."
        if (name := take(arguments, f"--{field.replace('_', '-')}")) is not None:
            chosen[field] = make(name) if make and ":" in name else lookup(field, name, choices)
    program = get_program_name(subcommand=argv is not None)
    return parse_options(program, arguments, config, (start or config)(**chosen), texts)


def run_subcommand(
    commands: Mapping[str, Callable[[list[str]], int | None]], description: str | None
) -> int | None:
    """Call the command that the first argument names with the other arguments; return its status.

    Each command parses its own options, so that it imports only what it needs. Without arguments,
    or with `--help`, the description is printed; with `--version`, the version.

    Raises:
        UserError: there is no such command.
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(inspect.cleandoc(description or ""))
        return None
    if name == "--version":
        print_version()
        return None
    return lookup("command", name, commands)(arguments)


def print_version() -> None:
    print(f"saliency-shards {version_of('saliency-shards')}")


def get_program_name(subcommand: bool = False) -> str:
    """Return the command as the user typed it: `python -m bench train`, or a script's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec and f"python -m {spec.name.removesuffix('.__main__')}"
    words = sys.argv[1:2] if subcommand else []
    return " ".join([module or Path(sys.argv[0]).name, *(w for w in words if w[0] != "-")])


def take(arguments: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from the arguments; return the last value given."""
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
