"""Files that are written whole or not at all."""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the file at `path`; whatever happens meanwhile, a reader finds the old content or the new one.

    The new file is made beside the old one, since a rename is atomic within one file system only. A link at `path` is
    replaced, not followed. The mode is that of the old file, else what the process's umask gives.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(staged, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            staged.chmod(path.stat().st_mode & 0o777)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        raise
    _sync_folder(path.parent)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a crash, where folders can be opened (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
