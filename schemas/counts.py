"""Write a number and a noun."""


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with the noun in its singular or plural form.

    >>> format_count(1, "shard"), format_count(0, "shard"), format_count(2, "class", "classes")
    ('1 shard', '0 shards', '2 classes')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
