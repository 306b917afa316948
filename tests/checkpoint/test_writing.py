"""Files appear whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from secateurs.checkpoint import copy_file, read_json, write_json, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": [1, None]})
    assert read_json(tmp_path / "x.json") == {"ü": [1, None]}
    transposed = {"t": torch.arange(6.0).reshape(2, 3).T}  # GPT-2's weights are views like this
    write_tensors(tmp_path / "x.safetensors", transposed)
    [(name, tensor)] = load_file(tmp_path / "x.safetensors").items()
    assert name == "t"
    assert torch.equal(tensor, transposed["t"])
    copy_file(tmp_path / "x.json", tmp_path / "y.json")
    assert read_json(tmp_path / "y.json") == {"ü": [1, None]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.safetensors", "y.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    file = tmp_path / "x.json"
    write_json(file, {"version": 1})
    with monkeypatch.context() as patch:
        patch.setattr(f"secateurs.checkpoint.writing.os.{step}", fail)
        with pytest.raises(error):
            write_json(file, {"version": 2})
    assert read_json(file) == {"version": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_under_safetensors_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("secateurs.checkpoint.writing.save_file", half)
    with pytest.raises(OSError, match=r"cannot write '.*x.safetensors': .*No space left"):
        write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert not list(tmp_path.iterdir())


def test_files_are_readable_to_whom_the_user_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "x.safetensors.tmp").touch(mode=0o600)  # left by a run that was killed
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
