import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file, atomic_folder, tidy
from tests.fixtures.small_files import small_files


def leave_half(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "video.mp4"
    with atomic_file(path) as temporary:
        assert temporary.suffix == ".mp4"
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["x" * 251 + ".png", "ü" * 120 + "x" * 11 + ".png", "a." + "y" * 250, "z" * 255]
)
def test_the_longest_names_can_be_written(name: str, tmp_path: Path) -> None:
    """The temporary file has a longer name than the file, so it is shortened."""
    path, other = tmp_path / name, tmp_path / (name[:-5] + "_" + name[-4:])
    assert len(os.fsencode(name)) >= 250
    with atomic_file(path) as temporary, atomic_file(other) as beside:
        assert temporary != beside
        assert temporary.suffix in (path.suffix, ".partial")
        temporary.write_text("one")
        beside.write_text("two")
    assert (path.read_text(), other.read_text()) == ("one", "two")
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, other.name}


def test_file_is_kept_if_writing_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        leave_half(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_kept_if_writing_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        leave_half(temporary / "half")
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_kept_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, system_rename = tmp_path / "folder", Path.rename
    path.mkdir()
    (path / "old").touch()

    def interrupted_rename(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise KeyboardInterrupt
        return system_rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


_KILLED_IN_BETWEEN = """
import os, sys
from pathlib import Path
from driving_sim.engine.files import atomic_folder
rename = Path.rename
Path.rename = lambda old, new: os._exit(9) if ".partial" in old.name else rename(old, new)
with atomic_folder(Path(sys.argv[1])):
    pass
"""


@pytest.mark.parametrize("name", ["run", "run-1.5"])
def test_a_folder_renamed_before_a_kill_is_restored(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "old").touch()
    killed = subprocess.run([sys.executable, "-c", _KILLED_IN_BETWEEN, str(path)], check=False)
    assert killed.returncode == 9
    assert not path.exists()
    tidy(tmp_path)
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_on_windows_no_folder_is_opened_and_files_are_synced_when_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_open, system_sync = os.open, os.fsync
    synced = []

    def refusing_open(path: Path, flags: int) -> int:
        if path.is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system_open(path, flags)

    def refusing_sync(descriptor: int) -> None:
        os.write(descriptor, b"")  # raises EBADF if the file is open for reading only
        system_sync(descriptor)
        synced.append(descriptor)

    monkeypatch.setattr("driving_sim.engine.files._WINDOWS", True)
    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "fsync", refusing_sync)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("one")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("two")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "two"
    assert len(synced) == 2


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    big = bytes(10_000)
    refusal = r"cannot write .*/out: File too large"
    refused = pytest.raises(DriveSimError, match=refusal)
    with small_files(), refused, atomic_folder(tmp_path / "out") as folder:
        (folder / "a.safetensors").write_bytes(big)
    with small_files(), refused, atomic_file(tmp_path / "out") as file:
        file.write_bytes(big)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a") as temporary:
        raise FileNotFoundError(errno.ENOENT, "input is missing", str(temporary))


def test_error_names_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DriveSimError, match=r"cannot create the folder .*/file/runs: Not a dir"),
        atomic_file(tmp_path / "file" / "runs" / "a"),
    ):
        pass


def test_permission_errors_are_converted_for_the_output_only(tmp_path: Path) -> None:
    def refuse(name: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    with pytest.raises(DriveSimError, match="cannot write"), atomic_file(tmp_path / "a") as file:
        refuse(file)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
        refuse(Path("/videos/private.mp4"))
