"""What `compress` refuses before it writes, what it says, and what travels with the weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig

import folders
from secateurs.checkpoint import output_lock
from secateurs.pruning.walk import prune
from secateurs.runtime import SparseLinear, compress, decompress


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compress")
    prune(folders.save(place / "dense", "llama"), output=place / "pruned", method="magnitude", pattern="70%")
    return place / "pruned"


def test_nothing_worth_it_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    folder = folders.save(tmp_path / "model", "llama")
    tensors = folders.tensors_of(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][:, :2] = 0  # 2 of 48
    folders.rewrite(folder, tensors)
    before = folders.everything_in(tmp_path)
    message = (
        r"\Anothing in '.*model' is worth compressing: 'model.layers.1.mlp.up_proj' has the most zeros, 4.2%,"
    )
    with pytest.raises(ValueError, match=message):
        compress(folder, tmp_path / "out")
    assert folders.everything_in(tmp_path) == before


def test_as_many_zeros_as_it_says_are_enough(tmp_path: Path) -> None:
    """The share named in the error is the least that is compressed."""
    model = AutoModelForCausalLM.from_config(FalconConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, alibi=False
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"0.0%, where (\d+)% are needed") as caught:
        compress(tmp_path / "model", tmp_path / "out")
    needed = int(str(caught.value).partition("where ")[2].partition("%")[0]) / 100
    for share, enough in ((needed - 0.02, False), (needed + 0.02, True)):
        weight = model.transformer.h[0].mlp.dense_h_to_4h.weight.data
        weight[:] = 1
        weight.flatten()[: round(share * weight.numel())] = 0
        model.save_pretrained(tmp_path / f"{share}")
        if enough:
            assert compress(tmp_path / f"{share}", tmp_path / "out").layers == 1
        else:
            with pytest.raises(ValueError, match="worth compressing"):
                compress(tmp_path / f"{share}", tmp_path / "out")


def test_what_was_packed_is_said(pruned: Path, tmp_path: Path) -> None:
    done = compress(pruned, tmp_path / "out")
    tensors = folders.tensors_of(pruned)
    packed = [name for name, t in folders.tensors_of(tmp_path / "out").items() if t.dtype == torch.uint8]
    share = sum(tensors[name].nbytes for name in packed) / sum(t.nbytes for t in tensors.values())
    assert done.layers == len(packed) == 21
    assert done.share == pytest.approx(share)
    assert str(done).startswith("21 layers compressed, 1 left dense; ")
    assert str(done).endswith(f"({share:.0%} of the weights' bytes are packed)")


def test_falcons_own_linear_layers_are_compressed(tmp_path: Path) -> None:
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and ".h." in name:
            weight.data[torch.rand(weight.shape) < 0.7] = 0
    model.save_pretrained(tmp_path / "model")
    assert compress(tmp_path / "model", tmp_path / "small").layers == 8
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(isinstance(module, SparseLinear) for module in small.modules()) == 8
    ids = torch.arange(12)[None]
    # With gradients: Falcon adds to what a layer gives in place.
    assert torch.allclose(small(ids).logits, model(ids).logits, atol=1e-4)
    decompress(tmp_path / "small", tmp_path / "again")
    again = folders.tensors_of(tmp_path / "again")
    assert all(
        torch.equal(tensor, again[name]) for name, tensor in folders.tensors_of(tmp_path / "model").items()
    )


def test_what_lies_beside_travels_and_the_card_says_what_was_done(pruned: Path, tmp_path: Path) -> None:
    (pruned / "sub").mkdir()
    beside = {
        "USE_POLICY.md": b"\r\n",
        "tokenizer.model": b"\0\xff",
        "sub/a.jinja": b"{{ x }}",
        "notes.py": b"1/0",
    }
    for name, content in beside.items():
        (pruned / name).write_bytes(content)
    (pruned / "README.md").write_text("---\nlicense: mit\nbase_model: owner/model\n---\nThe card.\n")
    compress(pruned, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again")
    for folder in (tmp_path / "small", tmp_path / "again"):
        for name in (*beside, "tokenizer.json", "generation_config.json", "secateurs.json"):
            assert (folder / name).read_bytes() == (pruned / name).read_bytes(), name
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.base_model) == ("mit", "owner/model")
        assert "The card." in card.text
        assert str(pruned.parent) not in (folder / "README.md").read_text()


def test_plain_transformers_loads_what_was_pruned_and_decompressed(pruned: Path, tmp_path: Path) -> None:
    compress(pruned, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again")
    script = f"""
import sys
from transformers import AutoModelForCausalLM
for folder in {[str(pruned), str(tmp_path / "again")]!r}:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() >= 0.7
assert "secateurs" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_killed_run_is_cleared_by_the_next(pruned: Path, tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
import secateurs.runtime.convert as convert
convert.write_json = lambda *_: os.kill(os.getpid(), 9)
convert.compress({str(pruned)!r}, Path({str(tmp_path / "out")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == -9
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.lock"}
    compress(pruned, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_two_runs_do_not_write_into_one_folder(pruned: Path, tmp_path: Path) -> None:
    with output_lock(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing"):
        compress(pruned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_no_index_lists_is_kept(pruned: Path, tmp_path: Path) -> None:
    shards = {file.name: load_file(file) for file in pruned.glob("*.safetensors")}
    last = max(shards)
    (tmp_path / "model").mkdir()
    for path in pruned.iterdir():
        if path.is_file():
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    save_file({**shards[last], "more": torch.ones(3)}, tmp_path / "model" / last)
    compress(tmp_path / "model", tmp_path / "out")
    assert torch.equal(folders.tensors_of(tmp_path / "out")["more"], torch.ones(3))
