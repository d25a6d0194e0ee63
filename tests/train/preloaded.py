"""What each rank needs, imported once in the process that ranks are forked from."""

import train.trainer  # noqa: F401
