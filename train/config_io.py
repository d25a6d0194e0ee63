"""Options as YAML: what a run writes to its folder, and what `--config` reads."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.recipes import Recipe, get_recipe
from schemas import UserError
from schemas.cli import lookup
from schemas.settings import fields_of, to_plain
from train.config import KnnConfig, TrainConfig, use_current_names
from train.methods import find_method, get_method_name
from train.optim import OptimConfig
from train.presets import PRESETS, Preset

Options = TypeVar("Options")

DECIDED = "decided"
PARTS: dict[str, Any] = {"recipe": Recipe, "optim": OptimConfig, "knn": KnnConfig}


def dump_config(user_config: TrainConfig, decided: TrainConfig) -> str:
    """Return all options as they were given, with the method's name, and the decided values.

    The decided values are for the reader only: they are not read back, so other options change
    them again.
    """
    content = to_plain(asdict(user_config))
    content["method"] = {"name": get_method_name(type(user_config.method)), **content["method"]}
    content[DECIDED] = {
        "crop_size": decided.recipe.crop_size,
        "lr": decided.optim.lr,
        "precision": decided.precision,
    }
    return yaml.safe_dump(content, sort_keys=False)


def load_config(path: str) -> TrainConfig:
    """Read a file that `dump_config` or a user wrote.

    Options that a user's file leaves out are those of the method's preset, as on the command line.
    A run's own file holds all options of its version; options that were added later get their
    defaults. A method or a recipe may be its name alone, as on the command line.

    Raises:
        UserError: no such file, invalid YAML, an unknown name, a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date like 2026-13-45, or no UTF-8
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains no options of the form `name: value`")
    content = use_current_names(content)
    for part in ("method", "recipe"):
        if isinstance(content.get(part), str):
            content[part] = {"name": content[part]}
    for part in ("method", *PARTS):
        if not isinstance(content.get(part) or {}, dict):
            raise UserError(
                f"{path}: {part}: is {content[part]!r}, not options of the form `name: value` "
                "on separate lines"
            )
    method = dict(content.pop("method", None) or {})
    method_type = find_method(take_name(method, "moco", f"{path}: method"))
    is_of_a_run = content.pop(DECIDED, None) is not None
    preset = PRESETS.get(method_type.name)
    if is_of_a_run or preset is None or type(preset.config.method) is not method_type:
        preset = Preset(TrainConfig())
    else:
        method = fields_of(preset.config.method) | method
    recipe = dict(content.get("recipe") or {})
    name = take_name(recipe, "", f"{path}: recipe")
    base = get_recipe(name) if name else preset.config.recipe
    content["recipe"] = fields_of(base) | preset.views | recipe
    for part, kind in PARTS.items():
        values = fields_of(getattr(preset.config, part)) | (content.get(part) or {})
        content[part] = build_options(kind, values, f"{path}: {part}")
    content["method"] = build_options(method_type, method, f"{path}: method")
    # a preset has neither data nor folder
    general = {name: x for name, x in fields_of(preset.config).items() if x is not tyro.MISSING}
    return build_options(TrainConfig, general | content, path)


def take_name(options: dict[str, Any], default: str, where: str) -> str:
    """Remove and return the name among the options of a file; `where` begins the message."""
    name = options.pop("name", None)
    if not isinstance(name, str | None):
        raise UserError(f"{where}: name: is {name!r}, not a name")
    return name or default


def build_options(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """Build a dataclass of options from plain values; `where` begins the messages of errors."""
    names = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        try:
            lookup("option", name, names)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {place}: {first['msg']}") from error
