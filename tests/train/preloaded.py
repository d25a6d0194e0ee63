"""Import what each rank needs, once, in the process from which ranks are forked."""

import train.trainer  # noqa: F401
