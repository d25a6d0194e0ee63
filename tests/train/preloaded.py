"""What each rank needs, imported once in the process that ranks are forked from."""

import train.loop  # noqa: F401
