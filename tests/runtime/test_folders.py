"""Compressed folders, as users meet them: written, loaded by transformers, saved, served, broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, logits, pruned
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import secateurs  # noqa: F401 - registers the format
from secateurs.runtime import SparseLinear, compress, decompress
from secateurs.runtime.format import pack

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from fuzz_format import fuzz


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> its dense folder and its compressed one."""
    made = {}
    for family in CONFIGS:
        dense, compressed = (tmp_path_factory.mktemp(family) / name for name in ("dense", "compressed"))
        pruned(family).save_pretrained(dense, max_shard_size="100KB" if family == "llama" else "1GB")
        compress(dense, compressed)
        made[family] = (dense, compressed)
    return made


def sparse_layers(model: PreTrainedModel) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_compressed_model_computes_what_its_dense_twin_does(
    family: str, folders: dict[str, tuple[Path, Path]]
) -> None:
    dense, compressed = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders[family])
    assert len(sparse_layers(compressed)) >= 8
    assert compressed.dtype == torch.bfloat16
    difference = (logits(compressed).float() - logits(dense).float()).abs().max()
    assert difference <= 0.02 * logits(dense).float().abs().max()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_round_trip_is_exact_up_to_the_sign_of_zero(
    family: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    dense, compressed = folders[family]
    decompress(compressed, tmp_path / "again")
    before, after = weights(dense), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name] + 0.0, after[name] + 0.0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (dense / "config.json").read_text()
    )


def test_a_sharded_model_stays_sharded(folders: dict[str, tuple[Path, Path]]) -> None:
    dense, compressed = folders["llama"]
    assert len(list(dense.glob("*.safetensors"))) > 1
    index = json.loads((compressed / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights(dense))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(compressed).values())


def test_save_pretrained_writes_it_again(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    _, compressed = folders["llama"]
    model = AutoModelForCausalLM.from_pretrained(compressed)
    model.save_pretrained(tmp_path)
    before, after = weights(compressed), weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_bare_model_loads_and_saves_too(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folders["llama"][1])
    assert len(sparse_layers(model)) == 14
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert len(sparse_layers(again)) == 14
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_a_device_map_is_followed_but_not_to_the_disk(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    compressed = folders["llama"][1]
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(compressed, device_map="auto")), expected)
    where = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="'lm_head' cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(compressed, device_map=where, offload_folder=tmp_path)


def test_a_loaded_model_is_as_small_as_promised(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    config = LlamaConfig(vocab_size=320, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for sparsity in (0.5, 0.9):
        for name, weight in dense.named_parameters():
            if "proj" in name:
                weight.data[weight.abs() < weight.abs().float().quantile(sparsity)] = 0
        dense.save_pretrained(tmp_path / f"{sparsity}")
        compress(tmp_path / f"{sparsity}", tmp_path / f"{sparsity}-small")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{sparsity}-small")
        layers = sparse_layers(model)
        promised = ((1 - sparsity) * 2 + 1 / 8) * sum(m.in_features * m.out_features for m in layers)
        in_file = sum(
            t.nbytes for name, t in weights(tmp_path / f"{sparsity}-small").items() if "proj" in name
        )
        in_memory = sum(t.nbytes for m in layers for t in [*m.parameters(), *m.buffers()])
        assert len(layers) == 7
        assert in_file == pytest.approx(promised, rel=0.03)
        assert in_memory == pytest.approx(promised, rel=0.03)


def test_load_state_dict_counts_anew_and_refuses_lies(folders: dict[str, tuple[Path, Path]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"][1])
    layer = model.model.layers[0].mlp.up_proj
    turned = layer.dense_weight().flip(0)  # as many weights in all, others in each row
    packed, _ = pack(turned)
    layer.load_state_dict({"weight": packed})
    x = torch.randn(2, layer.in_features)
    assert torch.allclose(layer(x), x @ turned.float().T, atol=1e-4)
    packed = packed.clone()
    packed[0] ^= 1
    with pytest.raises(ValueError, match="bits in its mask"):
        model.load_state_dict({"model.layers.0.mlp.up_proj.weight": packed}, strict=False)
    assert torch.equal(layer.dense_weight(), turned)


def test_what_is_not_worth_it_stays_dense(tmp_path: Path) -> None:
    model = pruned("opt", sparsity=0.05)
    model.model.decoder.layers[0].fc1.weight.data[:, :40] = 0
    model.save_pretrained(tmp_path / "dense")
    done = compress(tmp_path / "dense", tmp_path / "out")
    assert (done.layers, done.dense_layers) == (1, 11)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.decoder.layers[0].fc1, SparseLinear)


def test_activations_may_have_another_dtype(folders: dict[str, tuple[Path, Path]]) -> None:
    dense, compressed = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders["opt"])
    assert sparse_layers(compressed)[0].layout.dtype == torch.bfloat16
    assert torch.allclose(logits(compressed), logits(dense), atol=1e-4)


def test_plain_transformers_never_loads_it(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    # `save_pretrained` drops what stands guard in config.json; then the packed weights have a shape that no
    # linear layer takes, which is an error unless one asks for sizes to be ignored.
    AutoModelForCausalLM.from_pretrained(folders["opt"][1]).save_pretrained(tmp_path)
    script = f"""
from transformers import AutoModelForCausalLM
for folder, settings in [
    ({str(folders["opt"][1])!r}, {{}}),
    ({str(folders["opt"][1])!r}, {{"ignore_mismatched_sizes": True}}),
    ({str(tmp_path)!r}, {{}}),
]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, **settings)
    except (ValueError, RuntimeError) as error:
        print("refused:", error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, third = (line for line in run.stdout.splitlines() if line.startswith("refused:"))
    assert "import secateurs" in first
    assert first == second
    assert "ignore_mismatched_sizes" in third


def test_adapters_get_the_gradients_that_they_get_on_the_dense_twin(
    folders: dict[str, tuple[Path, Path]],
) -> None:
    class LowRank(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.ones(4, base.in_features) / 8)
            self.b = torch.nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.a.T @ self.b.T

    def gradient(folder: Path, tokens: int) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        first = model.model.layers[0].mlp
        first.up_proj = LowRank(first.up_proj)
        ids = torch.arange(tokens)[None]
        model(ids, labels=ids).loss.backward()
        return first.up_proj.b.grad

    for tokens in (8, 60):
        dense, compressed = (gradient(folder, tokens) for folder in folders["llama"])
        assert dense.abs().max() > 0
        assert torch.allclose(compressed, dense, rtol=1e-3, atol=1e-3 * dense.abs().max())


def test_peft_takes_it_for_a_linear_layer(folders: dict[str, tuple[Path, Path]]) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folders["llama"][1])
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(24)[None]
    adapted(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert len(gradients) == 8
    assert all(gradient is not None for gradient in gradients)


def test_torch_compile_sees_one_operator_per_layer(folders: dict[str, tuple[Path, Path]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"][1])
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), expected, atol=0.02)


def test_the_output_must_be_new_and_the_input_right(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    dense, compressed = folders["opt"]
    for function, source, target, message in [
        (compress, dense, compressed, "exists already"),
        (compress, compressed, tmp_path / "a", "compressed already"),
        (decompress, dense, tmp_path / "b", "is not compressed"),
        (compress, tmp_path / "none", tmp_path / "c", "no model folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(source, target)


def test_an_interrupted_command_leaves_nothing(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateurs.runtime.convert.write_json", interrupt)
    for function, source in ((compress, folders["opt"][0]), (decompress, folders["opt"][1])):
        with pytest.raises(KeyboardInterrupt):
            function(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_broken_files_are_refused_by_layer(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    _, compressed = folders["opt"]
    broken = tmp_path / "broken"
    broken.mkdir()
    name = "model.decoder.layers.0.fc1"
    good, config = weights(compressed), json.loads((compressed / "config.json").read_text())

    def refused(changed: dict[str, torch.Tensor], settings: dict[str, object], message: str) -> None:
        save_file(changed, broken / "model.safetensors", metadata={"format": "pt"})
        (broken / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(broken)
        with pytest.raises(ValueError, match=message):
            decompress(broken, tmp_path / "dense")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    settings = config["quantization_config"]
    packed = good[f"{name}.weight"]
    flipped = packed.clone()
    flipped[0] ^= 1
    refused(good | {f"{name}.weight": packed[:-1].clone()}, settings, f"{name}.*should be")
    refused(good | {f"{name}.weight": flipped}, settings, f"{name}.*bits in its mask")
    refused({k: v for k, v in good.items() if k != f"{name}.weight"}, settings, f"{name}.*has no weight")
    refused(good, settings | {"version": 4}, "version 4 is not known")
    refused(good, settings | {"more": 2}, "and nothing else")
    layers = settings["layers"]
    refused(
        good,
        settings | {"layers": {k: v for k, v in layers.items() if k != name}},
        f"{name}.*does not say how",
    )
    refused(
        good, settings | {"layers": layers | {"lm_head": layers[name]}}, "'lm_head' is not a linear layer"
    )
    refused(
        good,
        settings | {"layers": layers | {name: layers[name] | {"shape": [64, 64]}}},
        f"{name}.*the model's",
    )


@pytest.mark.parametrize("kind", ["dense", "experts", "codes"])
def test_mutated_folders_load_right_or_not_at_all(kind: str) -> None:
    counts = fuzz(200, seed=1, kind=kind)
    assert counts.total() == 200
    assert min(counts["refused"], counts["right"]) > 5
