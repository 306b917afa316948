"""Models with experts, compressed: what is packed, how it runs, what comes back, what is refused."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from expert_models import CONFIGS, EXPERTS, pruned
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import DTYPES, sparse
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import folders
from secateurs.anatomy import UnsupportedArchitectureError
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.names import abbreviated, expanded, skeleton_of
from secateurs.runtime import SparseLinear, compress, decompress, packable
from secateurs.runtime.experts import SparseExperts, hold_packed
from secateurs.runtime.format import pack_experts
from secateurs.runtime.layout import ExpertsLayout
from secateurs.runtime.linear import Packed
from secateurs.runtime.parameters import Parameters, unpacked

OUTSIDE = [("dbrx", "DbrxExpertGLU", 6), ("llama4_text", "Llama4TextExperts", 8)]
"""What is counted where it is not known that they are experts' matrices."""
IDS = torch.arange(40).view(2, 20) * 7 % 320


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """Name -> a dense folder in many shards, a compressed one, and what was said."""
    found = {}
    for name, config in CONFIGS.items():
        dense, small = (tmp_path_factory.mktemp(name) / part for part in ("dense", "small"))
        pruned(config).save_pretrained(dense, max_shard_size="60KB")
        found[name] = (dense, small, compress(dense, small))
    return found


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def same(first: Path, second: Path) -> None:
    """Up to the sign of zeros."""
    before, after = folders.tensors_of(first), folders.tensors_of(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor + 0.0, after[name] + 0.0), name


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_its_dense_twin_does(name: str, made: dict[str, Any]) -> None:
    dense, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in made[name][:2])
    experts = [module for module in small.modules() if isinstance(module, SparseExperts)]
    assert sum(len(module.offsets) for module in experts) == EXPERTS[name]
    expected = logits(dense)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(logits(deepcopy(small)), logits(small))
    said = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(small.generate(IDS[:1], **said), dense.generate(IDS[:1], **said))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_round_trip_is_exact_up_to_the_sign_of_zero(
    name: str, made: dict[str, Any], tmp_path: Path
) -> None:
    dense, small, _ = made[name]
    decompress(small, tmp_path / "again")
    same(dense, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (dense / "config.json").read_text()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_transformers_it_is_the_same_model(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    dense, small, _ = made[name]
    model = AutoModelForCausalLM.from_pretrained(small).eval()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), logits(model))
    decompress(tmp_path / "saved", tmp_path / "again")
    same(dense, tmp_path / "again")


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_counted(name: str, made: dict[str, Any]) -> None:
    dense, small, done = made[name]
    model = AutoModelForCausalLM.from_pretrained(small)
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    experts = sum(len(module.offsets) for module in packed if isinstance(module, SparseExperts))
    linears = sum(isinstance(module, SparseLinear) for module in packed)
    assert (done.experts, done.layers) == (experts, experts + linears)
    assert str(done).startswith(f"{done.layers} layers compressed ({experts} of them experts'), ")
    left = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert done.dense_layers == left
    total = sum(tensor.nbytes for tensor in folders.tensors_of(dense).values())
    assert done.share == pytest.approx(sum(module.layout.dense_bytes for module in packed) / total)


def test_a_tensor_without_a_file_is_in_no_index(made: dict[str, Any]) -> None:
    for _, small, _ in made.values():
        index = json.loads((small / "model.safetensors.index.json").read_text())
        tensors = folders.tensors_of(small)
        assert index["weight_map"].keys() == tensors.keys()
        assert set(index["weight_map"].values()) == {file.name for file in small.glob("*.safetensors")}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "dbrx", "jetmoe"])
def test_the_bare_model_loads_and_saves_too(name: str, made: dict[str, Any], tmp_path: Path) -> None:
    dense, model = (AutoModel.from_pretrained(folder).eval() for folder in made[name][:2])
    with torch.no_grad():
        expected, found = (m(IDS, use_cache=False).last_hidden_state for m in (dense, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path).eval()(IDS, use_cache=False).last_hidden_state
    assert torch.equal(again, found)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_no_other_implementation_takes_its_place(implementation: str, made: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        made["mixtral"][1], experts_implementation=implementation
    ).eval()
    expected = logits(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "longcat_flash"])
def test_gradients_pass_through(name: str, made: dict[str, Any]) -> None:
    def gradient(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        model(IDS, labels=IDS).loss.backward()
        return model.get_input_embeddings().weight.grad

    dense, small = (gradient(folder) for folder in made[name][:2])
    torch.testing.assert_close(small, dense, rtol=1e-3, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("gpt_oss", "1.mlp.experts.down_proj"),
        ("dbrx", "1.ffn.experts.mlp.w1"),
        ("llama4_text", "1.feed_forward.experts.down_proj"),
    ],
)
def test_one_product_may_stay_dense(name: str, only: str, tmp_path: Path) -> None:
    model = pruned(CONFIGS[name], only=only)
    model.save_pretrained(tmp_path / "dense")
    done = compress(tmp_path / "dense", tmp_path / "small")
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert (done.layers, done.experts, done.dense_layers) == (4, 4, linears + EXPERTS[name] - 4)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-4)


def test_experts_that_somebody_stored_fused_come_back_fused(tmp_path: Path) -> None:
    """By the model's own names, which transformers does not write, but reads."""
    model = pruned(CONFIGS["qwen3_moe"])
    model.save_pretrained(tmp_path / "dense")
    folders.rewrite(tmp_path / "dense", dict(model.state_dict()))
    compress(tmp_path / "dense", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-4)
    decompress(tmp_path / "small", tmp_path / "again")
    same(tmp_path / "dense", tmp_path / "again")


def test_a_later_version_only_where_it_is_needed(made: dict[str, Any], tmp_path: Path) -> None:
    for _, small, _ in made.values():
        assert settings_of(small)["version"] == 2
    pruned(CONFIGS["mixtral"], only="self_attn").save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "small")
    assert settings_of(tmp_path / "small")["version"] == 1
    pruned(CONFIGS["nemotron_h"], only="mixer.q_proj").save_pretrained(tmp_path / "dense2")
    compress(tmp_path / "dense2", tmp_path / "small2")  # whose readers would not know the name
    assert settings_of(tmp_path / "small2")["version"] == 2


@pytest.mark.parametrize(("name", "kind", "count"), OUTSIDE)
def test_experts_that_cannot_be_packed_are_counted_and_named(
    name: str, kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what the blocks do is not understood."""

    def refused(config: PreTrainedConfig) -> NoReturn:
        raise UnsupportedArchitectureError("its blocks are not called one after the other")

    monkeypatch.setattr(packable, "anatomy_of", refused)
    model = pruned(CONFIGS[name])
    model.save_pretrained(tmp_path / "dense")
    done = compress(tmp_path / "dense", tmp_path / "small")
    assert done.experts == 0
    assert done.outside == {kind: count}
    assert f"{count + 1} left dense ({count} of {kind} cannot be packed)" in str(done)
    assert "have zeros too and cannot be packed: " in str(done)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-4)
    pruned(CONFIGS[name], only="experts").save_pretrained(tmp_path / "only")
    with pytest.raises(ValueError, match=rf"zeros, but what {kind} keeps cannot be packed\Z"):
        compress(tmp_path / "only", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_own_code_multiplies_by_packed_matrices(
    turned: bool, flat: bool, dtype: torch.dtype
) -> None:
    """However it comes by one of them, or by all."""
    weights = torch.stack([sparse(32, 64, 0.7, dtype, seed) for seed in range(3)])
    parameter = torch.nn.Parameter(weights.mT.contiguous() if turned else weights)
    experts = torch.nn.Module()
    experts.w = torch.nn.Parameter(parameter.flatten(0, 1)) if flat else parameter
    packed, layout = pack_experts(weights, {"w": tuple(parameter.shape)})
    hold_packed(experts, "w", layout).load_state_dict({"weight": packed})
    w: Any = experts.w.view(parameter.shape) if flat else experts.w
    assert (w.shape, w.dtype, w.device) == (parameter.shape, dtype, torch.device("cpu"))
    x, bias = torch.randn(3, 5, 64, dtype=dtype), torch.randn(32, dtype=dtype)
    x[1], x[2, ::2] = 0, 0
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    if dtype != torch.float32:
        close = partial(torch.testing.assert_close, rtol=2e-2, atol=1e-1)
    out_in = (lambda w: w.mT) if turned else (lambda w: w)
    for number, expert in enumerate(torch.tensor([0, 1, 2])):
        expected = functional.linear(x[number], weights[number], bias)
        close(functional.linear(x[number], out_in(w[expert]), bias), expected)
        close(x[number] @ out_in(w[number]).T + bias, expected)
        close(torch.matmul(x[number], out_in(w.unbind(0)[number]).transpose(0, 1)) + bias, expected)
    if not flat:
        close(torch.bmm(x, out_in(w).transpose(1, 2)), torch.bmm(x, weights.mT))
        close(x[:1] @ out_in(w).mT, x[:1] @ weights.mT)
    with pytest.raises(ValueError, match=r"packed experts of \(3, 32, 64\) are multiplied by as if"):
        torch.randn(5, 32, dtype=dtype) @ out_in(w)[0]
    for misuse in (lambda: w * x[0, 0, 0], lambda: x[0] @ w[0].clone(), lambda: w[torch.tensor([0, 1])]):
        with pytest.raises(ValueError, match="packed experts cannot be used in"):
            misuse()


def test_a_layer_that_is_read_elsewhere_stays_dense(made: dict[str, Any]) -> None:
    _, small, _ = made["deepseek_v32"]
    model = AutoModelForCausalLM.from_pretrained(small)
    assert type(model.model.layers[0].self_attn.indexer.weights_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].self_attn.indexer.wk, SparseLinear)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_read_from_either_folder(name: str, made: dict[str, Any]) -> None:
    dense, small = (
        Parameters(checkpoint := Checkpoint(folder), skeleton_of(checkpoint)) for folder in made[name][:2]
    )
    assert dense.pieces == small.pieces
    loaded = AutoModelForCausalLM.from_pretrained(made[name][0], dtype="auto").state_dict()
    assert dense.pieces.keys() == loaded.keys()
    for key, tensor in loaded.items():
        assert torch.equal(dense.read(key), tensor)
        assert torch.equal(small.read(key) + 0.0, tensor + 0.0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 150),
    st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    st.sampled_from(DTYPES),
)
def test_packed_experts_are_the_documented_bytes(
    experts: int, rows: int, columns: int, sparsity: float, dtype: torch.dtype
) -> None:
    weights = torch.stack([sparse(rows, columns, sparsity, dtype, seed) for seed in range(experts)])
    packed, layout = pack_experts(weights, {"w": (experts, rows, columns)})
    begin, row_bytes = 0, -(-columns // 64) * 8
    for weight in weights:
        mask = packed[begin : begin + rows * row_bytes].view(rows, row_bytes)
        bits = (mask[:, :, None] >> torch.arange(8) & 1).flatten(1)
        assert torch.equal(bits[:, :columns].bool(), weight != 0)
        assert not bits[:, columns:].any()
        values = weight[weight != 0].view(torch.uint8)
        begin += mask.numel()
        assert torch.equal(packed[begin : begin + len(values)], values)
        end = begin + len(values) + 64
        begin = -(-end // 64) * 64
        assert not packed[end - 64 : begin].any()
    assert begin == len(packed) == layout.bytes
    assert ExpertsLayout.from_json("e", json.loads(json.dumps(layout.to_json()))) == layout
    assert torch.equal(unpacked("e", packed, layout), weights)


@given(st.integers(1, 12), st.lists(st.sampled_from(["w1", "w2.weight"]), min_size=1, unique=True))
def test_names_are_said_in_short(experts: int, parts: list[str]) -> None:
    names = {f"layers.3.experts.{i}.{part}": (len(part), 7) for i in range(experts) for part in parts}
    short = abbreviated(names, experts)
    assert len(short) == len(parts)
    assert expanded(short, experts) == names
    fused = {"layers.3.experts.up": (experts, 5)}
    assert abbreviated(fused, experts) == fused


def test_broken_files_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    _, small, _ = made["mixtral"]
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(broken)
    good, config = folders.tensors_of(broken), json.loads((broken / "config.json").read_text())
    key = next(key for key in good if key.endswith("0.block_sparse_moe.experts.down_proj_packed.weight"))
    name = "model.layers.0.mlp.experts.down_proj"
    entry = config["quantization_config"]["layers"][name]

    def refused(tensors: dict[str, torch.Tensor], changed: dict[str, Any] | None, message: str) -> None:
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        layers = {**config["quantization_config"]["layers"], name: changed}
        if changed is None:
            del layers[name]
        said = {**config["quantization_config"], "layers": layers}
        (broken / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(broken)
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z"):
            decompress(broken, tmp_path / "dense")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    packed = good[key]
    flipped = packed.clone()
    flipped[0] ^= 1
    refused({**good, key: packed[:-1].clone()}, entry, f"{key}.*should be")
    refused({**good, key: flipped}, entry, r"experts\.0\.down_proj' has \d+ bits in its mask")
    refused({k: v for k, v in good.items() if k != key}, entry, f"{name}' has no weight")
    refused(good, None, f"{key}.*does not say how")
    counts, shape = entry["nonzeros"], entry["shape"]
    turned = {**entry, "nonzeros": [counts[0] - 2, counts[1] + 2, *counts[2:]]}
    refused(good, turned, r"experts\.\d\.down_proj' has \d+ bits|should be")
    refused(good, {**entry, "nonzeros": counts[1:]}, "as many 'nonzeros' as it has experts")
    refused(good, {**entry, "shape": [2**60, *shape[1:]]}, "as many 'nonzeros' as it has experts")
    refused(good, {**entry, "nonzeros": sum(counts)}, "as many 'nonzeros' as it has experts")
    refused(good, {**entry, "shape": [shape[0], shape[2], shape[1]]}, "but the model's is")
    refused(good, {**entry, "shape": shape[1:]}, "needs 'shape', 'values' and 'nonzeros', and nothing else")
    refused(good, {**entry, "values": "int4"}, "come with version 3")
    for stored in (None, {"w": 3}, {"w": [0]}, {"w": [True]}):
        refused(good, {**entry, "stored": stored}, "names and shapes that it is 'stored' as")


def test_which_way_a_models_own_experts_are_is_seen_where_they_are_used(
    made: dict[str, Any], tmp_path: Path
) -> None:
    _, small, _ = made["llama4_text"]
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(broken)
    config = json.loads((broken / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.layers.1.feed_forward.experts.gate_up_proj"]
    experts, rows, columns = entry["shape"]

    def written(shape: list[int]) -> Path:
        entry["shape"] = shape
        (broken / "config.json").write_text(json.dumps(config))
        return broken

    with pytest.raises(ValueError, match="but the model's is"):
        AutoModelForCausalLM.from_pretrained(written([experts, rows // 2, columns * 2]))
    model = AutoModelForCausalLM.from_pretrained(written([experts, columns, rows]))
    with pytest.raises(ValueError, match=r"multiplied by as if each were \(192, 64\)\Z"):
        logits(model)
    with pytest.raises(ValueError, match=r"which Llama4ForCausalLM does not multiply by\Z"):
        decompress(broken, tmp_path / "dense")


def test_what_it_was_stored_as_has_to_be_of_the_model(made: dict[str, Any], tmp_path: Path) -> None:
    _, small, _ = made["mixtral"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in small.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((small / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["model.layers.0.mlp.experts.down_proj"]
    for stored in (
        {"model.norm.weight": [5 * 64 * 96]},
        {"nobody.*.knows": [64, 96]},
        {name: [96, 64] for name in entry["stored"]},
        {name: [32, 96] for name in entry["stored"]},
    ):
        entry["stored"] = stored
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"\A[^\n]*\Z"):
            decompress(broken, tmp_path / "dense")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_load_state_dict_counts_anew_and_refuses_lies(made: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made["mixtral"][1])
    experts = model.model.layers[0].mlp.experts.down_proj_packed
    turned = torch.stack([experts.dense_weight(i).flip(0) for i in range(5)])
    packed, _ = pack_experts(turned, experts.layout.stored)
    experts.load_state_dict({"weight": packed})
    x = torch.randn(3, 96)
    torch.testing.assert_close(experts.linear(4, x, None), x @ turned[4].T)
    packed = packed.clone()
    packed[0] ^= 1
    with pytest.raises(ValueError, match="bits in its mask"):
        experts.load_state_dict({"weight": packed})
