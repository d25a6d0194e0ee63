"""Options as a YAML file: what a run writes into its folder, and what `--config` reads."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.recipes import Recipe
from schemas import UserError
from schemas.cli import lookup
from schemas.settings import plain
from train.config import KnnConfig, TrainConfig
from train.methods import find_method, name_of
from train.optim import OptimConfig

Options = TypeVar("Options")

DECIDED = "decided"
PARTS: dict[str, Any] = {"recipe": Recipe, "optim": OptimConfig, "knn": KnnConfig}


def dump(given: TrainConfig, decided: TrainConfig) -> str:
    """All options as they were given, those of the method with its name; then what was decided.

    What was decided is for people: it is not read back, so that other options change it again.
    """
    content = plain(asdict(given))
    content["method"] = {"name": name_of(type(given.method)), **content["method"]}
    content[DECIDED] = {
        "crop_size": decided.recipe.crop_size,
        "lr": decided.optim.lr,
        "precision": decided.precision,
    }
    return yaml.safe_dump(content, sort_keys=False)


def load(path: str) -> TrainConfig:
    """Read what `dump` wrote, or a part of it: options that are not there have their defaults.

    Raises:
        UserError: no such file, no YAML, an unknown name, a value of another kind.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no options, name: value")
    content.pop(DECIDED, None)
    method = dict(content.get("method") or {})
    name = method.pop("name", "moco")
    content["method"] = made(find_method(name), method, f"{path}: method")
    for part, kind in PARTS.items():
        if part in content:
            content[part] = made(kind, content[part] or {}, f"{path}: {part}")
    return made(TrainConfig, content, path)


def made(kind: type[Options], values: dict[str, Any], where: str) -> Options:
    """A dataclass of options from plain values."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        try:
            lookup("option", name, known)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {place}: {first['msg']}") from error
