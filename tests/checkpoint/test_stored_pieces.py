"""Parameters put together from what is stored, against what from_pretrained loads; and taken apart again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    conversion_mapping,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import families
import folders
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.names import load_empty
from secateurs.checkpoint.pieces import Piece, _piece, _Traced, assemble, pieces_of, take_apart

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {**SIZES, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}
MODELS: dict[str, Callable[[], Any]] = {
    "Gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8),  # a tied head
    "Mixtral": lambda: transformers.MixtralConfig(**EXPERTS, num_local_experts=4),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8),
    "GptOss": lambda: transformers.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8),  # stored fused
    "GraniteMoe": lambda: transformers.GraniteMoeConfig(**EXPERTS, num_local_experts=4),
    "DeepseekV3": lambda: transformers.DeepseekV3Config(
        **EXPERTS, **MLA, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "NemotronH": lambda: transformers.NemotronHConfig(
        **{**EXPERTS, "num_hidden_layers": 3},
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        moe_shared_expert_intermediate_size=8,
        head_dim=8,
    ),
    "Llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
    ),
}


def model_of(config: Any, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """With random weights and buffers."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def pieces(folder: Path, kind: type[PreTrainedModel]) -> dict[str, tuple[Piece, ...]]:
    """Of a folder whose model is of a class."""
    checkpoint = Checkpoint(folder)
    config = kind.config_class.from_pretrained(folder)
    empty = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
    skeleton, report = load_empty(kind, config, empty)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return pieces_of(checkpoint, skeleton)


def agrees(folder: Path, kind: type[PreTrainedModel]) -> dict[str, tuple[Piece, ...]]:
    """What is put together is what transformers loads; what is taken apart is what is in the files."""
    stored = folders.tensors_of(folder)
    loaded = kind.from_pretrained(folder, dtype="auto").state_dict()
    found = pieces(folder, kind)
    back: dict[str, Tensor] = {}
    for name, parts in found.items():
        parameter = assemble(parts, stored)
        torch.testing.assert_close(parameter.to(loaded[name].dtype), loaded[name], rtol=0, atol=0)
        take_apart(parameter.clone(), parts, back)
    assert set(loaded) == set(found)
    assert set(back) == set(stored)
    for name, tensor in stored.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)  # dtypes and shapes too
    return found


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_what_transformers_loads(name: str, tmp_path: Path) -> None:
    model = model_of(MODELS[name]())
    model.save_pretrained(tmp_path)
    agrees(tmp_path, type(model))


def test_experts_lie_in_files_one_by_one(tmp_path: Path) -> None:
    model = model_of(MODELS["Mixtral"]())
    model.save_pretrained(tmp_path)
    found = agrees(tmp_path, type(model))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    experts = "model.layers.1.block_sparse_moe.experts"
    assert {piece.stored for piece in found[name]} == {
        f"{experts}.{i}.{part}.weight" for i in range(4) for part in ("w1", "w3")
    }
    parameter = model.state_dict()[name]
    for piece in found[name]:
        expert = int(piece.stored.split(".")[-3])
        rows = slice(0, 24) if ".w1." in piece.stored else slice(24, 48)
        torch.testing.assert_close(piece.of(parameter), parameter[expert, rows], rtol=0, atol=0)
        assert piece.of(parameter).data_ptr() == parameter[expert, rows].data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2"])
def test_files_of_the_bare_model(name: str, tmp_path: Path) -> None:
    model = families.build(name)
    model.save_pretrained(tmp_path)
    prefix = f"{model.base_model_prefix}."
    folders.rewrite(tmp_path, {k.removeprefix(prefix): v for k, v in folders.tensors_of(tmp_path).items()})
    found = agrees(tmp_path, type(model))
    (embedding,) = (n for n in found if n.endswith(("wte.weight", "tokens.weight")))
    assert found["lm_head.weight"] == found[embedding]


def test_one_whole_tensor_is_not_copied(tmp_path: Path) -> None:
    model = model_of(MODELS["Gemma2"]())
    model.save_pretrained(tmp_path)
    stored, name = folders.tensors_of(tmp_path), "model.layers.0.mlp.up_proj.weight"
    parts = pieces(tmp_path, type(model))[name]
    assert assemble(parts, stored).data_ptr() == stored[name].data_ptr()


class AddOne(ConversionOps):
    """As some formats of files have norms' weights."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        return {target_patterns[0]: next(iter(input_dict.values()))[0] + 1}


class FirstHalf(ConversionOps):
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        tensor = next(iter(input_dict.values()))[0]
        return {target_patterns[0]: tensor[: len(tensor) // 2]}


def converted(monkeypatch: pytest.MonkeyPatch, *conversions: Any) -> None:
    """Have transformers load Llama's files so."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, "llama", list(conversions))


def llama(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> type[PreTrainedModel]:
    """A folder whose tensors were changed."""
    model = families.build("llama")
    model.config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return type(model)


QKV = [f"self_attn.{name}_proj.weight" for name in "qkv"]


def test_one_stored_tensor_of_several_parameters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gate and up in one matrix, row by row in turns; k and v in one."""

    def change(tensors: dict[str, Tensor]) -> None:
        for i in range(3):
            path = f"model.layers.{i}."
            gate, up = (tensors.pop(f"{path}mlp.{name}_proj.weight") for name in ("gate", "up"))
            tensors[f"{path}mlp.w13.weight"] = torch.stack([gate, up], 1).flatten(0, 1)
            tensors[f"{path}self_attn.kv.weight"] = torch.cat([tensors.pop(path + name) for name in QKV[1:]])

    kind = llama(tmp_path, change)
    fused = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converted(
        monkeypatch,
        WeightConverter("mlp.w13.weight", fused, [Interleave(dim=0), Chunk(dim=0)]),
        WeightConverter("self_attn.kv.weight", QKV[1:], [Chunk(dim=0)]),
    )
    found = agrees(tmp_path, kind)
    (piece,) = found["model.layers.0.mlp.up_proj.weight"]
    assert not piece.whole


def test_other_names_other_layouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("norm.weight"):
                tensors[name.replace("weight", "gamma")] = tensors.pop(name)
            if name.endswith("down_proj.weight"):
                tensors[name.replace("down_proj", "w2")] = tensors.pop(name).T.contiguous()
            if name.endswith("o_proj.weight"):
                first, second = tensors.pop(name).chunk(2, dim=1)
                tensors[name.replace("o_proj", "o_b")] = first.contiguous()
                tensors[name.replace("o_proj", "o_a")] = second.contiguous()

    kind = llama(tmp_path, change)
    converted(
        monkeypatch,
        WeightRenaming("norm.gamma", "norm.weight"),
        WeightConverter("mlp.w2.weight", "mlp.down_proj.weight", [Transpose(0, 1)]),
        WeightConverter(
            ["self_attn.o_b.weight", "self_attn.o_a.weight"], "self_attn.o_proj.weight", [Concatenate(1)]
        ),
        WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope()]),
    )
    agrees(tmp_path, kind)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (AddOne(), r"'model\.norm\.weight' of Llama.* is computed"),
        (FirstHalf(), r"'model\.norm\.weight' in .* 96 elements.* 48"),
    ],
)
def test_what_is_computed_is_refused(
    operation: ConversionOps, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if isinstance(operation, FirstHalf):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].repeat(2)

    kind = llama(tmp_path, change)
    converted(monkeypatch, WeightConverter("model.norm.weight", "model.norm.weight", [operation]))
    with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        pieces(tmp_path, kind)


def in_turns(x: Tensor) -> Tensor:
    """One of the first half, one of the second, and so on."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).reshape(x.shape)


STEPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "turned": lambda x, i: x.transpose(i % x.dim(), -1).contiguous(),
    "permuted": lambda x, i: x.permute(*range(1, x.dim()), 0),
    "flat": lambda x, i: x.reshape(-1),
    "folded": lambda x, i: x.reshape(2, -1) if x.numel() % 2 == 0 else x,
    "unfolded": lambda x, i: x.reshape(-1, 2) if x.numel() % 2 == 0 else x,
    "taken in turns": lambda x, i: in_turns(x) if x.shape[0] % 2 == 0 else x,
    "split and turned round": lambda x, i: torch.cat(x.chunk(2, i % x.dim())[::-1], i % x.dim()),
    "unbound and stacked": lambda x, i: torch.stack(x.unbind(i % x.dim())[::-1], (i + 1) % x.dim()),
    "selected": lambda x, i: torch.stack([x.select(0, j) for j in range(x.shape[0])], -1),
    "sliced": lambda x, i: torch.cat([x[1:], x[:1]]),
    "rolled": lambda x, i: torch.cat([x.narrow(-1, 0, 1), x.narrow(-1, 1, x.shape[-1] - 1)], -1),
    "sides of one": lambda x, i: x.unsqueeze(i % x.dim()).unsqueeze(0).squeeze(0),
}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3)), max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_every_element_is_followed(steps: list[tuple[str, int]], shape: list[int], count: int) -> None:
    """Whatever moves elements about: done to tensors, and followed."""
    size = torch.Size(shape).numel()
    stored = {str(i): i * size + torch.arange(size).view(shape) for i in range(count)}
    traced = {name: _Traced.stored(name, shape) for name in stored}

    def moved(tensors: list[Tensor]) -> Tensor:
        x = torch.stack(tensors)
        for step, i in steps:
            x = STEPS[step](x, i)
        return x.contiguous()

    true, followed = moved(list(stored.values())), moved(list(traced.values()))
    assert isinstance(followed, _Traced)
    assert followed.shape == true.shape
    if sum(region.source.numel() for region in followed.regions) != true.numel():
        assert {"flat", "folded", "unfolded", "taken in turns"} & {step for step, _ in steps}
        return  # several tensors, of another shape: lost, and said so
    parts = [_piece(region, true, tuple(shape), torch.int64) for region in followed.regions]
    torch.testing.assert_close(assemble(parts, stored), true, rtol=0, atol=0)
    back = take_apart(true, parts)
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
