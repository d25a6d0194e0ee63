"""What a person can mend, apart from what is a defect of ours."""


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, never as a traceback.

    The message names the thing, the reason and the next step.
    """


class FormatError(UserError):
    """What lies on disk is not a dataset of a format version that this code reads."""
