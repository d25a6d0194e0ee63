"""Options as YAML: what a run writes to its folder, and what `--config` reads."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.recipes import Recipe, get_recipe
from schemas import UserError
from schemas.cli import lookup
from schemas.settings import fields_of, plain
from train.config import KnnConfig, TrainConfig, use_current_names
from train.methods import find_method, get_method_name
from train.optim import OptimConfig

Options = TypeVar("Options")

DECIDED = "decided"
PARTS: dict[str, Any] = {"recipe": Recipe, "optim": OptimConfig, "knn": KnnConfig}


def dump_config(user_config: TrainConfig, decided: TrainConfig) -> str:
    """Return all options as they were given, with the method's name, and the decided values.

    The decided values are for the reader only: they are not read back, so other options change
    them again.
    """
    content = plain(asdict(user_config))
    content["method"] = {"name": get_method_name(type(user_config.method)), **content["method"]}
    content[DECIDED] = {
        "crop_size": decided.recipe.crop_size,
        "lr": decided.optim.lr,
        "precision": decided.precision,
    }
    return yaml.safe_dump(content, sort_keys=False)


def load_config(path: str) -> TrainConfig:
    """Read a file by `dump_config`, or a part of one: missing options have their defaults.

    Raises:
        UserError: no such file, invalid YAML, an unknown name, a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no options, name: value")
    content = use_current_names(content)
    content.pop(DECIDED, None)
    method = dict(content.get("method") or {})
    name = method.pop("name", "moco")
    content["method"] = build_options(find_method(name), method, f"{path}: method")
    recipe = dict(content.get("recipe") or {})
    if (recipe_name := recipe.pop("name", None)) is not None:
        content["recipe"] = fields_of(get_recipe(recipe_name)) | recipe
    for part, kind in PARTS.items():
        if part in content:
            content[part] = build_options(kind, content[part] or {}, f"{path}: {part}")
    return build_options(TrainConfig, content, path)


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
