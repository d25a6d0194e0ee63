"""Convert file names, which may be any bytes, to the UTF-8 text that tables hold, and back."""

import re

ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|[\\'])")


def to_stored(location: str) -> str:
    """Return a location in the form that the tables store: unchanged if it is valid UTF-8.

    Otherwise it is quoted as a shell reads it, `$'caf\\xe9.jpg'`, so that the file can be found
    again. Python represents the invalid bytes of such a name as surrogates, which UTF-8 cannot
    encode.
    """
    if not location.startswith("$'") and is_utf8(location):
        return location
    escaped = location.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{to_bytes(escaped).decode('utf-8', 'backslashreplace')}'"


def from_stored(stored: str) -> str:
    """Return the location from which `to_stored` made this text."""
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
    """Return the bytes of a file name; surrogates that stand for no byte are kept as they are."""
    try:
        return location.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return location.encode("utf-8", "surrogatepass")
