"""Locations as text: a file name is any bytes, a table holds UTF-8."""

import re

ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|[\\'])")


def to_stored(location: str) -> str:
    """Return a location as the tables hold it: as it is, if it is UTF-8.

    Otherwise it is quoted as a shell reads it, `$'caf\\xe9.jpg'`, so that the file can be found
    again. Python holds such a name's odd bytes as surrogates, which are no UTF-8.
    """
    if not location.startswith("$'") and is_utf8(location):
        return location
    escaped = location.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{to_bytes(escaped).decode('utf-8', 'backslashreplace')}'"


def from_stored(stored: str) -> str:
    """Return the location that `to_stored` was given."""
    if not (stored.startswith("$'") and stored.endswith("'")):
        return stored
    content = ESCAPE.sub(
        lambda match: bytes([int(match[1][1:], 16)]) if match[1][:1] == b"x" else match[1],
        stored[2:-1].encode(),
    )
    return content.decode("utf-8", "surrogateescape")


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_bytes(location: str) -> bytes:
    """Return the bytes of a file's name; surrogates that stand for no byte are kept as they are."""
    try:
        return location.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return location.encode("utf-8", "surrogatepass")
