"""A folder is written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from gauge_ext.checkpoint import staged_folder
from gauge_ext.checkpoint.staging import hidden_folder, write_bytes
from gauge_ext.errors import AdapterFormatError, WriteError


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: path -> content, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fill(target: Path, files: dict[str, bytes], error: BaseException | None = None) -> None:
    """Write ``files`` to a staged folder, and then fail if there is an ``error``."""
    with staged_folder(target) as folder:
        for name, content in files.items():
            write_bytes(folder / name, content)
        if error is not None:
            raise error


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with staged_folder(target) as folder:
        write_bytes(folder / "a", b"1")
        (folder / "sub").mkdir()
        write_bytes(folder / "sub" / "b", b"2")
        assert not target.exists()
    assert tree(tmp_path / "deep") == {
        "er": None,
        "er/target": None,
        "er/target/a": b"1",
        "er/target/sub": None,
        "er/target/sub/b": b"2",
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def test_in_a_folder_that_exists_others_stay(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"k")
    (tmp_path / "replaced").write_bytes(b"old")
    with staged_folder(tmp_path) as folder:
        write_bytes(folder / "replaced", b"new")
        write_bytes(folder / "added", b"a")
        assert (tmp_path / "replaced").read_bytes() == b"old"
    assert tree(tmp_path) == {"added": b"a", "kept": b"k", "replaced": b"new"}


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_folder(tmp_path / "link") as folder:
        write_bytes(folder / "a", b"1")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"a": b"1"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), AdapterFormatError("x")])
def test_a_failing_body_leaves_nothing(tmp_path: Path, exists: bool, error: BaseException) -> None:
    target = tmp_path / "deep" / "target"
    if exists:
        target.mkdir(parents=True)
        (target / "a").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(type(error)):
        fill(target, {"a": b"new"}, error)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills_up_in_the_middle(
    small_files: Callable[[int], AbstractContextManager[None]], tmp_path: Path, exists: bool
) -> None:
    target = tmp_path / "deep" / "target"
    if exists:
        target.mkdir(parents=True)
        (target / "a").write_bytes(b"old")
    before = tree(tmp_path)
    with small_files(4096), pytest.raises(WriteError) as caught:
        fill(target, {"a": b"new", "big": b"x" * 100_000})
    assert tree(tmp_path) == before
    assert f"{target} could not be written: File too large." in str(caught.value)
    assert "ulimit" in str(caught.value.hint)
    assert isinstance(caught.value, OSError)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"No space left on device\. The disk is full") as caught:
        fill(tmp_path / "target", {"a": b"new"})
    assert caught.value.hint == "The disk is full; free some space."
    assert tree(tmp_path) == {}


def test_a_target_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"f")
    for target, words in (
        (tmp_path / "file", "file is a file. Choose another folder"),
        (tmp_path / "file" / "below" / "it", "file is a file. Choose another folder"),
        (Path("/proc/nowhere/target"), "could not be written"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(WriteError, match=words), staged_folder(target):
            pytest.fail("the body must not run")
    assert tree(tmp_path) == {"file": b"f"}


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that may be read but not written to, by root neither."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # nobody: root may write everywhere
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_without_the_right_to_write(locked: Path) -> None:
    for target in (locked, locked / "target"):
        with (
            pytest.raises(WriteError, match=r"Permission denied\. Choose a folder that you may"),
            staged_folder(target),
        ):
            pytest.fail("the body must not run")
    assert tree(locked) == {}


def test_a_failure_while_publishing_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "c"):
        (tmp_path / name).write_bytes(b"old")
    replace = Path.replace

    def failing(self: Path, to: Path) -> Path:
        if self.parent.name == "new" and self.name == "c":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", failing)
    before = tree(tmp_path)
    with pytest.raises(WriteError, match="Input/output error"):
        fill(tmp_path, dict.fromkeys("abc", b"new"))
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_what_a_killed_writer_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".out.dead.partial"
    dead.mkdir()
    (dead / "huge").write_bytes(b"x")
    others = [tmp_path / ".out.dead", tmp_path / ".other.dead.partial", tmp_path / "out.partial"]
    for other in others:
        other.mkdir()
    with hidden_folder(tmp_path, "out") as first, hidden_folder(tmp_path, "out") as second:
        assert not dead.exists()
        assert first != second
        assert {*tmp_path.iterdir()} == {first, second, *others}
    assert {*tmp_path.iterdir()} == {*others}
