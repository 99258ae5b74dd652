from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from gauge_ext.errors import WriteError
from gauge_ext.export.disk.files import (
    data_name,
    require_space,
    staged_files,
    staged_folder,
    write_errors,
)


def test_files_appear_at_the_end_with_usual_rights(tmp_path, listing):
    target = tmp_path / "new" / "m.onnx"
    with staged_files(target) as folder:
        (folder / "m.onnx").write_text("graph")
        (folder / "m.onnx.data").write_text("data")
        assert not target.exists()
        assert folder.parent == target.parent
    assert listing() == ["new", "new/m.onnx", "new/m.onnx.data"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_files_replace_what_was_there(tmp_path, listing):
    target = tmp_path / "m.onnx"
    for text in ("first", "second"):
        with staged_files(target) as folder:
            (folder / "m.onnx").write_text(text)
            (folder / "m.onnx.data").write_text(text)
    assert listing() == ["m.onnx", "m.onnx.data"]
    assert target.read_text() == (tmp_path / "m.onnx.data").read_text() == "second"


def test_a_new_file_of_weights_never_takes_the_place_of_the_old(tmp_path, listing):
    target = tmp_path / "m.onnx"
    (tmp_path / "m.onnx.data2").write_text("not ours")
    for data in ("m.onnx.data", "m.onnx.1.data", "m.onnx.data"):
        with staged_files(target) as folder:
            assert data_name(target) == data
            (folder / "m.onnx").write_text(data)
            (folder / data_name(target)).write_text("weights")
        assert listing() == sorted(["m.onnx", data, "m.onnx.data2"])


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_in_the_body_passes_and_leaves_nothing(error, tmp_path, listing):
    target = tmp_path / "a" / "b" / "m.onnx"

    def write() -> None:
        with staged_files(target) as folder:
            (folder / "m.onnx").write_text("graph")
            raise error

    with pytest.raises(type(error)):
        write()
    assert listing() == []


@pytest.mark.parametrize("failing", ["m.onnx", "m.onnx.data"])
def test_a_move_that_fails_brings_back_what_was_there(failing, tmp_path, listing, monkeypatch):
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text("before")
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name == failing:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)

    def write() -> None:
        with staged_files(tmp_path / "m.onnx") as folder:
            for name in ("m.onnx", "m.onnx.data"):
                (folder / name).write_text("after")

    with pytest.raises(WriteError, match="Input/output error"):
        write()
    assert listing() == ["m.onnx", "m.onnx.data"]
    assert {(tmp_path / name).read_text() for name in listing()} == {"before"}


def test_a_folder_as_target(tmp_path):
    with pytest.raises(WriteError, match=r"it is a folder.*model\.onnx"), staged_files(tmp_path):
        pass


def test_a_relative_target(tmp_path, listing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_files(Path("m.onnx")) as folder:
        (folder / "m.onnx").write_text("graph")
    assert listing() == ["m.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="Choose a folder"), staged_files(tmp_path / "m"):
        pass


def test_staged_folder(tmp_path, listing):
    target = tmp_path / "out"
    with staged_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert listing() == ["out", "out/sub", "out/sub/file"]
    with pytest.raises(WriteError, match="not an empty folder"), staged_folder(target):
        pass
    with pytest.raises(WriteError, match="not an empty folder"), staged_folder(target / "sub/file"):
        pass
    assert (target / "sub" / "file").read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()

    def write() -> None:
        with staged_folder(empty) as folder:
            (folder / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert list(empty.iterdir()) == []


def test_space_is_asked_for_before(tmp_path):
    target = tmp_path / "not" / "there" / "m.onnx"
    require_space(target, 1)
    with pytest.raises(WriteError, match=r"MiB are free\. Free some space"):
        require_space(target, shutil.disk_usage(tmp_path).total + 1)
    assert not (tmp_path / "not").exists()


def test_the_systems_words_are_kept(tmp_path):
    message = r"cannot write .*m: No space left.*Free some"
    with pytest.raises(WriteError, match=message) as caught, write_errors(tmp_path / "m"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.__cause__.errno == errno.ENOSPC
