"""Embeddings whose tables are codes, and the heads that share them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decoders
import folders
import secateurs
from secateurs.checkpoint.scales import read_scales
from secateurs.runtime.embedding import SparseEmbedding, is_table
from secateurs.runtime.format import pack, row_offsets, unpack
from secateurs.runtime.kernels import rows
from secateurs.runtime.linear import SparseLinear
from secateurs.runtime.load import load_model
from secateurs.values import Values

GRIDS = [Values(8, 128), Values(4, 64), Values(4, 32, "half"), Values(3, 32), Values(2, 64, "half")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folders of a tiny model whose embedding is rounded: as such, compressed, and dense again."""
    here = tmp_path_factory.mktemp("embedding")

    def make(name: str) -> tuple[Path, Path, Path]:
        paths = rounded, small, again = tuple(here / f"{name}-{kind}" for kind in "rsd")
        if not again.exists():
            source = decoders.save(name, here / name, torch.bfloat16)
            text = {"calibration": decoders.tokens(4), "method": "sparsegpt", "device": "cpu"}
            secateurs.prune(source, output=rounded, pattern="0%", embedding="int4:group=32", **text)
            secateurs.compress(rounded, small)
            secateurs.decompress(small, again)
        return paths

    return make


@pytest.mark.parametrize("values", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [70, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_whole(values: Values, columns: int, dtype: torch.dtype, path: str) -> None:
    generator = torch.Generator().manual_seed(columns)
    scales = torch.rand(50, values.groups(columns), generator=generator).bfloat16()
    codes = torch.randint(2**values.bits, (50, columns), generator=generator).to(torch.uint8)
    weight = values.decode(codes, scales).to(dtype)
    packed, layout = pack(weight, (values, scales), masked=False)
    offsets = row_offsets("w", packed, layout)
    index = torch.randint(50, (3, 7), generator=generator)
    assert torch.equal(rows(index, packed, offsets, layout), weight[index])
    assert torch.equal(unpack(packed, layout), weight)
    assert rows(index[:0], packed, offsets, layout).shape == (0, 7, columns)
    for beyond in (50, -1):
        with pytest.raises(IndexError):
            rows(torch.tensor([beyond]), packed, offsets, layout)


def test_the_operator_is_one_to_torch() -> None:
    values = Values(4, 32)
    weight = values.decode(torch.arange(16, dtype=torch.uint8).repeat(8, 4), torch.ones(8, 2))
    packed, layout = pack(weight, (values, torch.ones(8, 2)), masked=False)
    operator: Any = torch.ops.secateurs.rows
    given = (torch.tensor([[1, 5]]), packed, row_offsets("w", packed, layout), 64, torch.float32)
    torch.library.opcheck(operator.default, (*given, 4, 32, False, False))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = load_model(folder)(input_ids=decoders.tokens(2, 16)).logits.float()
    return result


TIED, APART = ["smollm3", "gemma3_text", "opt", "mistral3", "gpt2"], ["llama", "llava", "falcon_h1"]


@pytest.mark.parametrize("name", [*TIED, *APART])
def test_a_packed_table_gives_what_the_dense_one_gave(name: str, made: Any) -> None:
    rounded, small, again = made(name)
    before, after = folders.tensors_of(rounded), folders.tensors_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    dense, packed = load_model(rounded), load_model(small)
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(table, SparseEmbedding)
    assert isinstance(head, SparseLinear)
    assert (table.weight is head.weight) == (name in TIED)
    ids = decoders.tokens(2, 16)
    assert torch.equal(table(ids), dense.get_input_embeddings()(ids))
    wanted, given = logits(rounded), logits(small)
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_what_transformers_saves_is_the_same(made: Any, tmp_path: Path) -> None:
    small = made("gemma3_text")[1]
    load_model(small).save_pretrained(tmp_path / "saved")
    first, second = (folders.tensors_of(folder) for folder in (small, tmp_path / "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(small), logits(tmp_path / "saved"))


def test_it_is_as_long_as_the_codes(made: Any) -> None:
    rounded, small, _ = made("gemma3_text")
    name = "model.embed_tokens.weight"
    dense, packed = (folders.tensors_of(folder)[name] for folder in (rounded, small))
    tokens, width = dense.shape
    assert width == 64  # one span of codes, in the low halves of as many bytes
    assert packed.numel() == tokens * (width + 2 * width // 32) + 64
    record = json.loads((small / "config.json").read_text())["quantization_config"]
    assert record["version"] == 3
    assert not record["layers"]["model.embed_tokens"]["mask"]


@pytest.mark.parametrize("change", ["mask", "as it is"])
def test_a_table_that_cannot_be_read_by_row_is_refused(change: str, made: Any, tmp_path: Path) -> None:
    small = made("gemma3_text")[1]
    weight = folders.tensors_of(made("gemma3_text")[0])["model.embed_tokens.weight"]
    grid = read_scales(made("gemma3_text")[0])["model.embed_tokens.weight"]
    packed, layout = pack(weight, grid, masked=True) if change == "mask" else pack(weight)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in small.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["layers"]["model.embed_tokens"] = layout.to_json()
    (broken / "config.json").write_text(json.dumps(config))
    folders.rewrite(broken, {**folders.tensors_of(small), "model.embed_tokens.weight": packed})
    with pytest.raises(ValueError, match=r"\A[^\n]*'model.embed_tokens' is an embedding[^\n]*\Z"):
        load_model(broken)


def test_a_table_stored_as_the_head_s_stays_dense(made: Any, tmp_path: Path) -> None:
    """transformers takes it for both; packed, it would have to be called the embedding's."""
    rounded = tmp_path / "rounded"
    shutil.copytree(made("opt")[0], rounded)
    tensors, scales = folders.tensors_of(rounded), read_scales(rounded)
    tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
    for name in [name for name in tensors if "fc1.weight" in name]:
        tensors[name][:, ::2] = 0
    folders.rewrite(rounded, tensors)
    assert scales
    done = secateurs.compress(rounded, tmp_path / "s")
    assert (done.layers, done.coded) == (2, 0)
    assert "rounded too and cannot be packed: 'model.decoder.embed_tokens.weight'" in str(done)
    assert torch.equal(folders.tensors_of(tmp_path / "s")["lm_head.weight"], tensors["lm_head.weight"])
    wanted, given = logits(rounded), logits(tmp_path / "s")
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_which_modules_are_tables() -> None:
    class Normed(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) / self.weight.norm()

    class Doubled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Direct(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return nn.Embedding.forward(self, input)

    assert is_table(nn.Embedding(4, 2))
    assert not is_table(Direct(4, 2))
    assert is_table(Doubled(4, 2))
    assert not is_table(Normed(4, 2))
    assert not is_table(nn.Embedding(4, 2, max_norm=1.0))
    assert not is_table(nn.Linear(4, 2))
