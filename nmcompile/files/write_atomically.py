"""Files that are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nmcompile.errors import FileError
from nmcompile.files.staging import staging_folder

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
UNCHANGED = "nothing was changed there"
REPLACED = "it is the new file, but may be the old one again after a power failure"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the file at `path`: a reader finds the old content or the new one, even after a crash.

    A link to a file is replaced, not followed. The mode is that of the old file, else what the process's umask gives.

    Raises:
        FileError: the file cannot be written, or `path` is a folder, a pipe or a device.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all are on disk before the first is replaced; they are replaced in order."""
    first, *_ = contents
    with staging(first) as folder:
        staged = [(folder / str(number), path) for number, path in enumerate(contents)]
        for (file, path), content in zip(staged, contents.values(), strict=True):
            check_target(path)
            write_synced(file, [content], path)
        for number, (file, path) in enumerate(staged):
            move_file(file, path, f"{first} is new all the same" if number else UNCHANGED)
        sync_folder(first, REPLACED)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Yield a private folder beside `path`, in which its next content is made; the folder is gone at the end.

    Raises:
        FileError: nothing can be written at `path`.
    """
    check_target(path)
    with contextlib.ExitStack() as stack:
        with failing(path, UNCHANGED):
            folder = stack.enter_context(staging_folder(path))
        yield folder


def check_target(path: Path) -> None:
    """Refuse to replace anything but a regular file, or a link to one."""
    for state in (os.lstat, os.stat):
        with failing(path, UNCHANGED):
            try:
                mode = state(path).st_mode
            except FileNotFoundError:
                return
        kind = next((kind for is_kind, kind in KINDS if is_kind(mode)), None)
        if kind is not None:
            raise FileError(f"{path} is {kind}; give the path of a regular file, or of none; {UNCHANGED}")


def write_synced(staged: Path, parts: Iterable[bytes], path: Path) -> None:
    """Make a file, and return when the disk has it; `path` is what error messages call it."""
    with failing(path, UNCHANGED), open(staged, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def move_file(staged: Path, path: Path, otherwise: str, like: Path | None = None) -> None:
    """Move a synced file to `path`, with the mode of the file that is at `like`, which is `path` by default.

    Args:
        staged: on the same disk.
        path: replaced in one step.
        otherwise: what is true if this fails; the error says it.
        like: another file whose mode is taken.
    """
    check_target(path)
    with failing(path, otherwise):
        with contextlib.suppress(FileNotFoundError):
            state = os.lstat(like or path)
            if stat.S_ISREG(state.st_mode):
                staged.chmod(stat.S_IMODE(state.st_mode) & 0o777)
        os.replace(staged, path)


def sync_folder(path: Path, otherwise: str) -> None:
    """Make the move of a file to `path` survive a crash, where folders can be opened (not on Windows)."""
    if os.name == "nt":
        return
    with failing(path, otherwise, "synced"):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def failing(path: Path, otherwise: str, done: str = "written") -> Iterator[None]:
    """Turn errors of the system into one that says what is true now."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            reason = f"{reason}: its folder has to be readable and writable"
        raise FileError(f"{path} cannot be {done} ({reason}); {otherwise}") from error
