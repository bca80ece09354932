"""A file that is written atomically is the old one or the new one, whatever happens."""

import errno
import os
import resource
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmcompile.errors import FileError
from nmcompile.files.staging import staging_folder
from nmcompile.files.write_atomically import write_atomically, write_together
from tests.faults import fail_at, steps_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan"


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Run as another user, since root has every permission."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_content_is_replaced_and_the_mode_kept(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(path.parent) == ["plan"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_a_new_file_has_the_mode_of_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_nobody_else_can_look_at_a_staged_file(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o600)
    before = os.umask(0)
    try:
        with staging_folder(path) as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("old", [b"old", None])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None
) -> None:
    said = set()
    if old is not None:
        path.write_bytes(old)
    for step in range(steps_of(lambda: write_atomically(path, b"new"))):
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            message = message_of(lambda: write_atomically(path, b"new"))
        unchanged = "No space left on device); nothing was changed there" in message
        assert (path.read_bytes() if path.exists() else None) == (old if unchanged else b"new")
        assert unchanged or "it is the new file" in message or not message
        said.add(message)
        if not message:  # the staging folder could not be removed
            write_atomically(path, b"new")
        assert [name for name in os.listdir(path.parent) if name != "plan"] == []
    assert len(said) == 3


def message_of(write: Callable[[], object]) -> str:
    """Return the error's message; "" if there is none."""
    try:
        write()
    except FileError as error:
        return str(error)
    return ""


def test_a_disk_that_is_full_in_the_middle_leaves_the_old_file(path: Path) -> None:
    """A limit on the size of files simulates the full disk: the write itself fails halfway."""
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(FileError, match=r"plan cannot be written \(File too large\); nothing was changed there"):
            write_atomically(path, bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["plan"]


def test_what_a_link_names_is_left_and_the_link_replaced(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    write_atomically(path, b"new")
    assert target.read_bytes() == b"precious"
    assert not path.is_symlink() and path.read_bytes() == b"new"


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_not_a_file_is_refused_and_left(path: Path, kind: str, through_a_link: bool) -> None:
    """A pipe, a device or an empty folder would be silently renamed over."""
    special = Path("/dev/null") if kind == "device" else path.with_name("special") if through_a_link else path
    if kind == "device" and not through_a_link:
        path = special
    make: dict[str, Callable[[], object]] = {
        "folder": lambda: special.mkdir(),
        "pipe": lambda: os.mkfifo(special),
        "socket": lambda: bind_socket(special),
        "device": lambda: None,
    }
    make[kind]()
    if through_a_link:
        path.symlink_to(special)
    mode = special.stat().st_mode
    with pytest.raises(FileError, match=f"{path.name} is a {kind}"):
        write_atomically(path, b"new")
    assert special.stat().st_mode == mode
    assert path.is_symlink() == through_a_link


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))  # a short name, as sockets need


@pytest.mark.parametrize("length", [237, 238, 255])
def test_any_name_that_the_file_system_takes_can_be_written(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("é" + "n" * (length - 2))
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and len(os.fsencode(path.name)) == length


@pytest.mark.parametrize(
    ("name", "reason"), [("n" * 256, "File name too long"), ("a/b", "No such file"), ("a\0b", "null"), ("..", "folder")]
)
def test_a_name_that_cannot_be_is_one_clear_error(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(FileError, match=reason):
        write_atomically(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o300, 0o500, 0o600], ids=["unreadable", "read-only", "not to be entered"])
def test_a_folder_without_permission_is_one_clear_error(as_nobody: None, mode: int) -> None:
    folder = Path("/tmp") / f"nmcompile-test-{os.getpid()}"  # nobody cannot enter the folders of pytest
    folder.mkdir()
    try:
        (folder / "plan").write_bytes(b"old")
        folder.chmod(mode)
        with pytest.raises(FileError, match=r"has to be readable and writable\); nothing was changed there"):
            write_atomically(folder / "plan", b"new")
        folder.chmod(0o700)
        assert (folder / "plan").read_bytes() == b"old" and os.listdir(folder) == ["plan"]
    finally:
        folder.chmod(0o700)
        (folder / "plan").unlink(missing_ok=True)
        folder.rmdir()


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(path: Path, tmp_path: Path) -> None:
    with staging_folder(path) as living, staging_folder(path.with_name("other")) as other:
        killed = living.with_name(living.name[:-16] + "0" * 16)
        killed.mkdir()
        (killed / "content").write_bytes(b"half")
        abandoned = other.with_name(other.name[:-16] + "0" * 16)
        abandoned.mkdir()
        link = living.with_name(living.name[:-16] + "1" * 16)
        link.symlink_to(tmp_path)
        write_atomically(path, b"new")
        assert not killed.exists()
        assert all(folder.is_dir() for folder in (living, other, abandoned)) and link.is_symlink()
    assert path.read_bytes() == b"new"


def test_writers_at_the_same_time_never_mix(path: Path) -> None:
    contents = [bytes([65 + number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(10):
            write_atomically(path, content)
            assert path.read_bytes() in contents

    failed: list[BaseException] = []

    def run(content: bytes) -> None:
        try:
            write(content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert path.read_bytes() in contents and os.listdir(path.parent) == ["plan"]


def test_of_files_that_belong_together_none_is_replaced_before_all_are_written(tmp_path: Path) -> None:
    first, second = tmp_path / "plan", tmp_path / "plan.json"
    first.write_bytes(b"old")
    second.mkdir()
    with pytest.raises(FileError, match=r"plan\.json is a folder"):
        write_together({first: b"new", second: b"new"})
    assert first.read_bytes() == b"old"
    second.rmdir()
    write_together({first: b"new", second: b"newer"})
    assert (first.read_bytes(), second.read_bytes()) == (b"new", b"newer")


def test_the_errors_of_the_system_are_ours(path: Path) -> None:
    with pytest.raises(FileError) as caught:
        write_atomically(path / "nowhere", b"new")
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOENT
