"""Write counts and lists of names for messages."""

from collections.abc import Sequence


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with the noun in its singular or plural form.

    >>> format_count(1, "shard"), format_count(0, "shard"), format_count(2, "class", "classes")
    ('1 shard', '0 shards', '2 classes')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def join_first(names: Sequence[str], limit: int) -> str:
    """Return the first names, at most `limit` of them, and the number of the others.

    >>> join_first(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
