"""Private folders beside a file, in which its next content is written.

A folder's name holds a hash of the file's name and a random part. So the name always fits, no two writers share one,
and the next writer of the file recognizes the folder of a killed one. A living writer holds a lock on its folder.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that only this user can enter, and remove it at the end; first remove those of dead writers.

    Raises:
        OSError: the folder of `path` does not exist, or cannot be read or written.
    """
    _remove_leftovers(path)
    folder, descriptor = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[bool]:
    """Let one writer of `path` in at a time; yield False if the file system has no locks and so lets all in.

    The lock is a file beside `path`. The writer that holds it removes it.
    """
    lock = path.with_name(f"{_prefix(path)}lock")
    while True:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            is_locked = _lock(descriptor, wait=True)
            if is_locked and not _is_at(descriptor, lock):
                continue  # its previous holder has removed it
            try:
                yield bool(is_locked)
            finally:
                with contextlib.suppress(OSError):
                    lock.unlink()
            return
        finally:
            os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".nmcompile-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """Make a folder and lock it; retry if another writer took it for a leftover before it was locked."""
    while True:
        folder = path.with_name(_prefix(path) + secrets.token_hex(8))
        folder.mkdir(mode=0o700)
        if sys.platform == "win32":
            return folder, None
        try:
            descriptor = _open_folder(folder)
        except FileNotFoundError:
            continue
        except BaseException:
            folder.rmdir()
            raise
        if _lock(descriptor, wait=True) is None or _is_at(descriptor, folder):
            return folder, descriptor
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove this user's staging folders for the same file whose writers are gone."""
    prefix = _prefix(path)
    for entry in os.listdir(path.parent):
        if sys.platform == "win32" or not entry.startswith(prefix) or entry == f"{prefix}lock":
            continue
        with contextlib.suppress(OSError):  # another writer removes it, or it is a link
            descriptor = _open_folder(path.with_name(entry))
            try:
                if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor, wait=False):
                    shutil.rmtree(path.with_name(entry), ignore_errors=True)
            finally:
                os.close(descriptor)


def _open_folder(folder: Path) -> int:
    """Open a folder that is not a link."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock an open file; return False if another holds the lock, None if the file system has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False
