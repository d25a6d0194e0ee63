"""Errors that the user can fix, as opposed to bugs."""


class UserError(Exception):
    """A mistake that the user can fix: shown as a short message, never as a traceback.

    The message names the thing, the reason and the next step.
    """


class FormatError(UserError):
    """The files on disk are not a dataset of a format version that this code can read."""


def summarize_error(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
