"""Versions of packages, for the records of a dataset or a run."""

from importlib import metadata


def version_of(package: str) -> str:
    """Return the version of an installed package, or `not installed`.

    A checkout that runs without having been installed has no version, and a machine may be set up
    for only some of the commands.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
