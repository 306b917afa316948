"""Model folders as files: what is read, and what is refused in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from secateurs.checkpoint import Checkpoint

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
    refuse(tmp_path, "is no model folder: it has no config.json")


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


def test_identity_changes_with_what_is_in_the_folder(single: Path) -> None:
    identity = Checkpoint(single).identity()
    assert Checkpoint(single).identity() == identity
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, single / "model.safetensors")
    edited = Checkpoint(single).identity()
    assert edited != identity
    (single / "config.json").write_text('{"model_type": "opt"}')
    assert Checkpoint(single).identity() not in (identity, edited)


def test_what_a_shard_holds_and_the_index_does_not_list_is_read(sharded: Path) -> None:
    index({"a": "one.safetensors", "b": "two.safetensors"}, sharded)
    assert_same(Checkpoint(sharded).load(["a", "b", "c"]), TENSORS)


def test_a_single_file_comes_before_an_index(sharded: Path) -> None:
    save_file({"d": TENSORS["a"]}, sharded / "model.safetensors")
    checkpoint = Checkpoint(sharded)
    assert checkpoint.files == ["model.safetensors"]
    assert_same(checkpoint.load(checkpoint.file_of), {"d": TENSORS["a"]})


def test_renamed_tensors_are_the_same_tensors(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert not checkpoint.renamed
    checkpoint.rename({"a": "x"})
    checkpoint.rename({"x": "y", "b": "a"})
    assert checkpoint.renamed
    assert checkpoint.file_of == {"y": "one.safetensors", "a": "two.safetensors", "c": "two.safetensors"}
    assert checkpoint.shapes["y"] == (2, 3)
    assert checkpoint.dtypes == {"y": "F32", "a": "BF16", "c": "U8"}
    expected = {"y": TENSORS["a"], "a": TENSORS["b"], "c": TENSORS["c"]}
    assert_same(checkpoint.load(["y", "a", "c"]), expected)


def test_adapters_without_a_model_are_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    refuse(tmp_path, "holds adapters and no model: merge them")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("model-q4.gguf", "llama.cpp"), ("consolidated.safetensors", "nothing says what belongs")],
)
def test_what_stands_there_instead_is_named(single: Path, name: str, hint: str) -> None:
    (single / "model.safetensors").rename(single / name)
    refuse(single, f"'{name}'", hint)
