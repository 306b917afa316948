"""Weight files that are written piece by piece, against safetensors and transformers' own splitting."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_file_size_to_int
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from secateurs.checkpoint.shards import BYTES, Shards, Stored, size_in_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


def drawn(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    bits = torch.randint(0, 2, (*shape,), generator=torch.Generator().manual_seed(seed))
    return bits.to(DTYPES[dtype])


tensors_of_models = st.lists(
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors_of_models, st.integers(1, 400), st.randoms(use_true_random=False))
def test_whatever_the_order_of_writing(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[str, tuple[int, ...]]],
    most: int,
    chance: object,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": drawn(dtype, shape, i) for i, (dtype, shape) in enumerate(kinds)}
    stored = {f"t{i}": Stored(dtype, shape) for i, (dtype, shape) in enumerate(kinds)}
    assert all(stored[name].bytes == tensor.nbytes for name, tensor in tensors.items())
    names = list(tensors)
    chance.shuffle(names)  # type: ignore[attr-defined]
    for some in (names[: len(names) // 2], names[len(names) // 2 :]):
        shards = Shards(folder, stored, most=most)  # as a run that goes on makes it anew
        shards.lay_out()
        shards.write((name, tensors[name]) for name in some)
    shards.finish()
    files = sorted(folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == shards.bytes
    found: dict[str, torch.Tensor] = {}
    for file in files:
        content = load_file(file)
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert sum(tensor.nbytes for tensor in content.values()) <= most or len(content) == 1
        found |= content
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(tensor.shape).double(), tensor.double())
        assert torch.equal(shards.read([name])[name].double(), tensor.double())
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_files_take_space_as_they_fill(tmp_path: Path) -> None:
    stored = {f"t{i}": Stored("F32", (2**18,)) for i in range(4)}  # a megabyte each
    shards = Shards(tmp_path, stored, most=10**9)
    assert shards.missing_bytes == shards.bytes
    shards.lay_out()
    missing = [shards.missing_bytes]
    for name in stored:
        shards.write([(name, torch.ones(2**18))])
        missing.append(shards.missing_bytes)
    taken = [before - after for before, after in itertools.pairwise(missing)]
    assert missing[0] > 4 * 10**6
    assert missing[-1] == 0
    assert all(step == pytest.approx(2**20, abs=2**14) for step in taken)


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path, {"t": Stored("F32", (2,))}, most=100)

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*model\.safetensors\.tmp': No space left on device"):
        shards.lay_out()
    assert not list(tmp_path.iterdir())


def test_element_sizes_are_torchs() -> None:
    assert all(BYTES[name] == dtype.itemsize for name, dtype in DTYPES.items())


@pytest.mark.parametrize("text", ["5GB", "500MB", "1.5GB", "10KiB", "7GiB"])
def test_sizes(text: str) -> None:
    assert size_in_bytes(text) == convert_file_size_to_int(text)
    assert size_in_bytes(text.lower()) == size_in_bytes(text)  # not gigabits


@pytest.mark.parametrize("text", ["", "0", "-1GB", "large", "5XB", 0])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="is no size: give 5GB"):
        size_in_bytes(text)
