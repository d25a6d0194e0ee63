"""Errors that the user can fix, as opposed to bugs."""


class UserError(Exception):
    """A mistake that the user can fix: shown as one line, never as a traceback.

    The message names the thing, the reason and the next step.
    """


class FormatError(UserError):
    """The files on disk are not a dataset of a format version that this code can read."""
