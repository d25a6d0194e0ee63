"""Find the missing shards; refuse to resume under other settings."""

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

from schemas.dataset import read_card
from schemas.errors import FormatError, UserError
from schemas.parallel import map_ahead
from schemas.settings import find_differences, format_differences
from schemas.shard import MARKERS_AT_A_TIME, ShardMarker, read_marker, read_markers
from schemas.storage import Store
from schemas.tables import CARD, SHARD_FOLDER, shard_name

SUFFIXES = ("tar", "idx", "parquet")
OF_ONE_PLAN = ("images", "shards", "plan", "first_shard")
"""Settings that may differ between a dataset and its extension."""


def find_missing_shards(
    store: Store, settings: dict[str, Any], defaults: dict[str, Any]
) -> list[int]:
    """Return the shards of a job that are absent or incomplete.

    Args:
        settings: `Job.settings`.
        defaults: `Job.default_settings`, for settings missing from an older version's markers.

    Raises:
        UserError: the existing shards were made with other settings.
    """
    first = settings.get("first_shard", 0)
    files = {f"{SHARD_FOLDER}/{name}": size for name, size in store.sizes(SHARD_FOLDER).items()}
    if first:
        if shard_name(0, "parquet") not in files:
            raise UserError(describe_missing_markers(store, first))
        old, new = map(drop_plan, (read_marker(store, 0).settings, settings))
        refuse_other_settings(store, old, new, defaults, lambda: "Give the earlier values")
    end = first + settings["shards"]
    own = {shard_name(shard, suffix) for shard in range(end) for suffix in SUFFIXES}

    def is_missing(shard: int) -> bool:
        tar, index, parquet = (shard_name(shard, suffix) for suffix in SUFFIXES)
        marker = read_sound_marker(store, shard) if parquet in files else None
        if marker:
            advice = partial(give_advice, store, files, first)
            refuse_other_settings(store, marker.settings, settings, defaults, advice)
        return not marker or files.get(tar) != marker.row.bytes or index not in files

    shards = range(first, end)
    are_gone = map_ahead(is_missing, shards, MARKERS_AT_A_TIME)
    missing = [shard for shard, is_gone in zip(shards, are_gone, strict=True) if is_gone]
    if foreign_files := sorted(
        name for name in files if name.endswith(SUFFIXES) and name not in own
    ):
        raise UserError(
            f"{store.url}: has shards of a larger dataset ({foreign_files[-1]}); choose another "
            "OUT, or delete the folder to start over"
        )
    return missing


def read_sound_marker(store: Store, shard: int) -> ShardMarker | None:
    """Return a shard's marker, or None if it is damaged, in which case the shard is rewritten."""
    try:
        return read_marker(store, shard)
    except FormatError:
        return None


def drop_plan(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a dataset and its extension have in common."""
    return {name: value for name, value in settings.items() if name not in OF_ONE_PLAN}


def refuse_shard_of_other_job(
    store: Store, marker: ShardMarker, settings: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Check that a finished shard belongs to this job, or to the dataset that the job extends.

    `find_missing_shards` checks the shards that exist before the job; another job in the same
    folder may have written some since.

    Args:
        settings, defaults: those of `find_missing_shards`.

    Raises:
        UserError: another job wrote the shard.
    """
    shard = marker.row.shard
    is_extended = shard < settings.get("first_shard", 0)
    old, new = marker.settings, settings
    if is_extended:
        old, new = drop_plan(old), drop_plan(new)
    text = describe_changes(old, new, defaults)
    if text is None:
        return
    advice = f"delete {shard_name(shard, '*')} there and run this command again, or choose"
    raise UserError(
        f"{store.url}: shard {shard} was written by another job: "
        f"{text or 'of other source images, or the same under other names'}; let no other job "
        f"write here, and {'make a new dataset in' if is_extended else advice} another OUT"
    )


def refuse_other_settings(
    store: Store,
    old: dict[str, Any],
    new: dict[str, Any],
    defaults: dict[str, Any],
    advise: Callable[[], str],
) -> None:
    """Compare the settings of two jobs. Raises a UserError that names each difference.

    Args:
        advise: returns what to do about it; called only if there is a difference.
    """
    text = describe_changes(old, new, defaults)
    if text is None:
        return
    raise UserError(
        f"{store.url}: was made with other settings: "
        f"{text or 'other source images, or the same under other names'}. {advise()}, or choose "
        "another OUT"
    )


def describe_changes(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]
) -> str | None:
    """Return the differences as text, empty if only the plan differs; None without any."""
    changes = find_differences(old, new, defaults)
    if not changes:
        return None
    has_same_count = all(change.name != "images" for change in changes)
    named = {"shards": "shards (from --shard-samples)"} if has_same_count else {}
    return format_differences(
        change._replace(name=named.get(change.name, change.name))
        for change in changes
        if change.name != "plan"
    )


def give_advice(store: Store, files: Container[str], first: int) -> str:
    """Return what to do about shards that were made with other settings.

    Args:
        files: names of the files of all shards.
        first: number of the first shard of an extension; 0 if nothing is extended.
    """
    if first:
        return (
            "Give the earlier values and restore the source as it was to finish the earlier "
            f"extension, delete its shards ({shard_name(first, '*')} and later) to restart it"
        )
    if store.exists(CARD):
        shards = range(read_card(store).shards)
        if all(shard_name(shard, "parquet") in files for shard in shards):
            return (
                "Give the earlier values, delete the folder to start over, add new images by "
                "--extend"
            )
    return (
        "Give the earlier values and restore the source as it was to complete it, delete the "
        "folder to start over"
    )


def read_dataset_markers(store: Store, shards: int) -> Iterator[ShardMarker]:
    """Read the markers of a complete dataset that is to be extended.

    Raises:
        UserError: a marker is missing.
        FormatError: a marker is damaged.
    """
    try:
        yield from read_markers(store, range(shards))
    except FileNotFoundError as error:
        raise UserError(describe_missing_markers(store, shards)) from error


def describe_missing_markers(store: Store, shards: int) -> str:
    """Explain that markers of a complete dataset are missing, and whether they can be rebuilt.

    The command that made a dataset rebuilds its shards, unless the dataset has been extended since.
    """
    files = store.sizes(SHARD_FOLDER)
    names = [shard_name(shard, "parquet") for shard in range(shards)]
    has_marker = [name.removeprefix(f"{SHARD_FOLDER}/") in files for name in names]
    missing = [name for name, exists in zip(names, has_marker, strict=True) if not exists]
    is_extended = any(has_marker) and (
        read_marker(store, has_marker.index(True)).settings.get("shards") != shards
    )
    advice = (
        "restore it from a copy, or make a new dataset in another OUT"
        if is_extended
        else "to rebuild it, run the command that made the dataset, without --extend and with the "
        "source as it was"
    )
    others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
    return f"{store.location(missing[0])}: missing{others}; {advice}"
