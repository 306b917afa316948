"""Model folders: what is read and written, and what is refused in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateurs.checkpoint import Checkpoint, copy_file, read_json, resolve, write_json, write_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([[1, 0]], dtype=torch.uint8),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, tmp_path / "two.safetensors")
    index({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, tmp_path)
    return tmp_path


def index(weight_map: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_by_name(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    assert checkpoint.shapes == {"a": (2, 3), "b": (2,), "c": (1, 2)}
    assert_same(checkpoint.load(["c", "a", "b"]), TENSORS)
    assert_same(checkpoint.load(["b"]), {"b": TENSORS["b"]})
    assert checkpoint.bytes == sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(single: Path) -> None:
    before = (single / "model.safetensors").read_bytes()
    Checkpoint(single).load(["a"])["a"].fill_(7)
    assert (single / "model.safetensors").read_bytes() == before


def refuse(folder: Path, *parts: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as caught:
        Checkpoint(folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "missing", "no model folder at", "missing")


@pytest.mark.parametrize("content", [None, "", "{", "[1]", b"\xff\xfe", '"text"'])
def test_a_config_that_is_no_config(single: Path, content: str | bytes | None) -> None:
    (single / "config.json").unlink()
    if content is not None:
        (single / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(single, "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_named_and_not_opened(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    refuse(single, f"'{name}' is pickled")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refuse(single, "no 'model.safetensors' or 'model.safetensors.index.json'")


def truncated(content: bytes) -> bytes:
    return content[:-1]


def half_a_header(content: bytes) -> bytes:
    return content[:20]


def header_of_garbage(content: bytes) -> bytes:
    return content[:8] + b"\xff" * 20 + content[28:]


def endless_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**62) + content[8:]


def longer_than_promised(content: bytes) -> bytes:
    return content + b"0"


def offsets_outside(content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    assert header != content[8 : 8 + size]
    return content[:8] + header + content[8 + size :]


def nothing(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        half_a_header,
        header_of_garbage,
        endless_header,
        longer_than_promised,
        offsets_outside,
        nothing,
    ],
)
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_damaged_file_is_named(
    layout: str, damage: Callable[[bytes], bytes], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    file = folder / ("model.safetensors" if layout == "single" else "two.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    refuse(folder, file.name)


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", "one.bin", 3, None]
)
def test_an_index_that_points_elsewhere(sharded: Path, target: object) -> None:
    outside = sharded.parent / "x.safetensors"
    save_file({"b": TENSORS["b"]}, outside)
    index({"a": "one.safetensors", "b": target}, sharded)
    refuse(sharded, "points outside its folder or not at safetensors", str(target))


def test_an_index_that_lists_what_is_not_there(sharded: Path) -> None:
    index({"a": "one.safetensors", "b": "three.safetensors"}, sharded)
    refuse(sharded, "lists 'three.safetensors', which is missing")
    index({"a": "one.safetensors", "d": "two.safetensors"}, sharded)
    refuse(sharded, "promises 'd' in 'two.safetensors'")
    index({"a": "two.safetensors"}, sharded)  # it is in another shard
    refuse(sharded, "promises 'a' in 'two.safetensors'")


@pytest.mark.parametrize("weight_map", [None, {}, [], "one.safetensors"])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    index(weight_map, sharded)
    refuse(sharded, "has no 'weight_map'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named_when_it_is_read(single: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 3, dtype=dtype)
    weight[2, 1] = value
    save_file({"a": TENSORS["a"], "layer.weight": weight}, single / "model.safetensors")
    checkpoint = Checkpoint(single)
    checkpoint.load(["a"])
    with pytest.raises(ValueError, match=r"\A'layer.weight' in '.*model.safetensors' holds NaN or Inf\Z"):
        checkpoint.load(["a", "layer.weight"])


def test_companions_are_what_makes_a_model_of_the_weights(sharded: Path) -> None:
    kept = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
        "chat_template.jinja", "LICENSE", "NOTICE.md",
    }  # fmt: skip
    for name in kept | {"pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.pt", "code.py"}:
        (sharded / name).write_text("{}")
    assert {path.name for path in Checkpoint(sharded).companions()} == kept


def test_identity_changes_with_what_is_in_the_folder(single: Path) -> None:
    identity = Checkpoint(single).identity()
    assert Checkpoint(single).identity() == identity
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, single / "model.safetensors")
    edited = Checkpoint(single).identity()
    assert edited != identity
    (single / "config.json").write_text('{"model_type": "opt"}')
    assert Checkpoint(single).identity() not in (identity, edited)


def test_a_model_that_is_nowhere_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    for name in (tmp_path / "missing", "./missing", "../missing", "~/missing", "some/deep/missing"):
        with pytest.raises(ValueError, match=r"\Ano model folder at '"):
            resolve(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network\nand much more to say")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"\A'owner/model' is not a folder here .*\(no network\).*\Z"):
        resolve("owner/model")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": [1, None]})
    assert read_json(tmp_path / "x.json") == {"ü": [1, None]}
    transposed = {"t": torch.arange(6.0).reshape(2, 3).T}  # GPT-2's weights are views like this
    write_tensors(tmp_path / "x.safetensors", transposed)
    assert_same(load_file(tmp_path / "x.safetensors"), transposed)
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
