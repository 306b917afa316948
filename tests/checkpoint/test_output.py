"""What would stop a run is found before its work; what it leaves is cleared, and nothing else is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import folders
from secateurs.checkpoint import Checkpoint, check_output, new_folder, output_lock


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(folders.save(tmp_path_factory.mktemp("output") / "model", "llama"))


def refused(output: Path, checkpoint: Checkpoint, message: str) -> None:
    before = sorted(checkpoint.folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        check_output(output, checkpoint, 0)
    assert sorted(checkpoint.folder.parent.rglob("*")) == before


def test_what_cannot_be_made(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.folder
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    refused(folder, checkpoint, "the model's own folder")
    refused(folder.parent / "x" / ".." / folder.name, checkpoint, "the model's own folder")
    refused(tmp_path / "link", checkpoint, "the model's own folder")
    refused(tmp_path / "link" / "out", checkpoint, "lies in the model's own folder")
    refused(folder / "a" / "b", checkpoint, "lies in the model's own folder")
    refused(tmp_path / "file", checkpoint, "exists already")
    refused(tmp_path / "full", checkpoint, "exists already")
    refused(tmp_path / "file" / "out", checkpoint, "cannot be made in '.*file' .Not a directory")
    refused(tmp_path / "dangling", checkpoint, "cannot be made")
    refused(tmp_path / ("x" * 250), checkpoint, "cannot be made .*File name too long")
    refused(Path("/dev/null/out"), checkpoint, "cannot be made in '/dev/null'")
    if os.path.isdir("/proc/self"):
        refused(Path("/proc/out"), checkpoint, "cannot be made in '/proc'")
        refused(Path("/proc/self/a/b"), checkpoint, "cannot be made in '/proc")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "mounted")
    refused(tmp_path / "mounted", checkpoint, "is a mount point")


def test_what_can_be_made_leaves_nothing_yet(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new", tmp_path / "a" / "b" / "c"):
        check_output(output, checkpoint, 1000)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_a_disk_that_is_too_small(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    check_output(tmp_path / "out", checkpoint, 9 * 10**8)
    with pytest.raises(OSError, match=r"the output needs 1\.0\d GB, .* has 1\.00 GB free"):
        check_output(tmp_path / "out", checkpoint, 10**9)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"

    def interrupted() -> None:
        with new_folder(output) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep"]
    with new_folder(output) as folder:
        (folder / "whole").touch()
        assert not output.exists()
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "out", "whole"}


def test_what_a_killed_run_left_is_cleared_and_what_is_not_ours_is_not(tmp_path: Path) -> None:
    kill = f"""
import os
from pathlib import Path
from secateurs.checkpoint import new_folder
with new_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", kill], check=False)
    assert (tmp_path / "out.partial" / "model" / "half").exists()
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "whole"}

    (tmp_path / "other.partial" / "progress").mkdir(parents=True)
    (tmp_path / "other.partial" / "progress" / "run.json").touch()  # of a run that prunes
    with pytest.raises(ValueError, match="holds another unfinished run"), new_folder(tmp_path / "other"):
        pass
    assert (tmp_path / "other.partial" / "progress" / "run.json").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    hold = f"""
import sys
from pathlib import Path
from secateurs.checkpoint import output_lock
with output_lock(Path({str(output)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=r"another run is writing '.*out': wait for it"),
            output_lock(output),
        ):
            pass
        with output_lock(tmp_path / "new" / "another"):
            pass
        other.kill()
    with output_lock(output):  # let go of by the system
        with pytest.raises(ValueError, match="another run"), output_lock(output):
            pass
        assert (tmp_path / "new" / "out.lock").exists()
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "out.lock").touch()  # left by whoever was killed
    with output_lock(output):
        pass


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"), output_lock(tmp_path / "file" / "out"):
        pass
