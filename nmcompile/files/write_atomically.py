"""Writing of files in full or not at all."""

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

    A link is replaced, not followed. The new file gets the mode of the old one, or else the default of the umask.

    Raises:
        FileError: the file cannot be written, or `path` is a folder, a pipe or a device.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: put all on disk, then replace the old ones in order."""
    first, *_ = contents
    with staging(first) as folder:
        staged = [(folder / str(number), path) for number, path in enumerate(contents)]
        for (file, path), content in zip(staged, contents.values(), strict=True):
            check_target(path)
            write_synced(file, [content], path)
        for number, (file, path) in enumerate(staged):
            move_file(file, path, f"{first} is already the new file" if number else UNCHANGED)
        sync_folder(first, REPLACED)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Yield a private folder beside `path` to write its next content in; remove the folder at the end.

    Raises:
        FileError: nothing can be written at `path`.
    """
    check_target(path)
    with contextlib.ExitStack() as stack:
        with failing(path, UNCHANGED):
            folder = stack.enter_context(staging_folder(path))
        yield folder


def check_target(path: Path) -> None:
    """Refuse to replace anything other than a regular file or a link to one."""
    for state in (os.lstat, os.stat):
        with failing(path, UNCHANGED):
            try:
                mode = state(path).st_mode
            except FileNotFoundError:
                return
        kind = next((kind for is_kind, kind in KINDS if is_kind(mode)), None)
        if kind is not None:
            raise FileError(f"{path} is {kind}; give the path of a regular file or a new one; {UNCHANGED}")


def write_synced(staged: Path, parts: Iterable[bytes], path: Path) -> None:
    """Write a new file and return once it is on disk; error messages call it `path`."""
    with failing(path, UNCHANGED), open(staged, "xb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def move_file(staged: Path, path: Path, otherwise: str, like: Path | None = None) -> None:
    """Move a synced file to `path`, with the mode of the file at `like`, by default `path`.

    Args:
        staged: a file on the same disk.
        path: replaced in one step.
        otherwise: the state of the files if this fails, as the error states it.
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
    """Make the move of a file to `path` survive a crash, if folders can be opened (not on Windows)."""
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
    """Turn a system error into one that states what was written."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError) and error.errno == errno.EACCES:
            reason = f"{reason}: its folder has to be readable and writable"
        raise FileError(f"{path} cannot be {done} ({reason}); {otherwise}") from error
