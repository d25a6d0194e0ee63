"""Tell folders on a network file system from those on a local disk."""

from pathlib import Path

MOUNTS = Path("/proc/mounts")
NETWORK_TYPES = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse"}
"""Types of file systems that fetch data over a network and keep nothing on the local disk."""


def find_network_mount(url: str) -> str | None:
    """Return the type of the network file system that a path lies on; None if it is local."""
    if "://" in url or not MOUNTS.exists():
        return None
    path = Path(url).resolve()
    mounts = (line.split() for line in MOUNTS.read_text().splitlines())
    kinds = {Path(point.replace("\\040", " ")): kind for _, point, kind, *_ in mounts}
    kind = next((kinds[point] for point in (path, *path.parents) if point in kinds), None)
    return kind if kind in NETWORK_TYPES else None
