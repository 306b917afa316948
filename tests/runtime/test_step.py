"""Single tokens in one call, against transformers' own code on the same packed weights."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

import decoders
from secateurs import prune
from secateurs.checkpoint.scales import write_scales
from secateurs.runtime import compress
from secateurs.runtime.cpu import cpu_kernels
from secateurs.runtime.load import load_model
from secateurs.runtime.step import ROOM, step_by_step
from secateurs.values import Values

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 80,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{**SIZES, "head_dim": 20}),
    "qwen3": Qwen3Config(**SIZES),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=[*["sliding_attention"] * 2, "full_attention"]
    ),
}
GRIDS = {
    "as stored": (0.5, None),
    "int8": (0.0, Values(8, 64)),
    "int4": (0.5, Values(4, 32)),
    "int2": (0.5, Values(2, 64, "half")),
}
"""Zeros, and the grid of the rest."""
PROMPT = torch.tensor([[5, 17, 3, 60, 9]])

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="no kernels were built")


def compressed(
    place: Path, family: str = "llama", dtype: torch.dtype = torch.float32, grid: str = "int4"
) -> Any:
    """A random model, whose matrices are packed."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
    scales = {}
    zeros, values = GRIDS[grid]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        if not name.endswith("proj.weight"):
            continue
        gone = torch.rand(parameter.shape) < zeros
        if values is not None:
            groups = values.groups(parameter.shape[1])
            steps = (torch.rand(len(parameter), groups) + 0.5) * 0.4 / (values.highest + 1)
            steps = steps.bfloat16()
            scales[name] = (values, steps)
            parameter.data[:] = values.decode(values.encode(parameter.data, steps), steps).to(dtype)
        parameter.data[gone] = 0
    model.save_pretrained(place / "pruned")
    write_scales(place / "pruned", scales)
    compress(place / "pruned", place / "small")
    return AutoModelForCausalLM.from_pretrained(place / "small").eval()


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return compressed(tmp_path, grid="as stored")


@contextmanager
def own_code(model: Any) -> Iterator[mock.Mock]:
    """Counts the calls of transformers' own forward pass of the decoder."""
    kind = type(model.get_decoder())
    with mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward) as own:
        yield own


def reference(model: Any) -> Any:
    """The same model, all of whose passes are transformers'."""
    other = copy.deepcopy(model)
    del other.get_decoder().forward
    return other


@torch.no_grad()
def logits(model: Any, tokens: Tensor, cache: Any = None, **told: Any) -> tuple[Tensor, Any]:
    """Of the prompt's last token and of those after it, each by itself, (1 + tokens, vocabulary)."""
    output = model(PROMPT, use_cache=True, past_key_values=cache)
    found, cache = [output.logits[0, -1]], output.past_key_values
    for token in tokens:
        found.append(model(token.view(1, 1), past_key_values=cache, use_cache=True, **told).logits[0, -1])
    return torch.stack(found), cache


def assert_close(given: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the size of all."""
    assert given.isfinite().all()
    assert (given - wanted).float().norm() <= tolerance * wanted.float().norm()


TOKENS = torch.tensor([7, 80, 33, 1, 2, 64, 11, 90])

# A number that lies between two of eight bits, to which the products of codes round, may go either way.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CLOSE_BY_CODES = {torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 4e-2}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_what_transformers_makes(family: str, dtype: torch.dtype, grid: str, tmp_path: Path) -> None:
    model = compressed(tmp_path, family, dtype, grid)
    wanted, wanted_cache = logits(reference(model), TOKENS)
    with own_code(model) as own:
        given, cache = logits(model, TOKENS)
    assert own.call_count == 1  # of the prompt
    tolerance = (CLOSE if grid == "as stored" else CLOSE_BY_CODES)[dtype]
    assert_close(given, wanted, tolerance)
    assert cache.get_seq_length() == PROMPT.numel() + len(TOKENS)
    for layer, other in zip(cache.layers, wanted_cache.layers, strict=True):
        assert_close(layer.keys, other.keys, tolerance)
        assert_close(layer.values, other.values, tolerance)


def test_on_every_instruction_set(path: str, tmp_path: Path) -> None:
    model = compressed(tmp_path, "qwen3", grid="as stored")
    wanted, _ = logits(reference(model), TOKENS)
    with own_code(model) as own:
        given, _ = logits(model, TOKENS)
    assert own.call_count == (1 if path != "torch" else 1 + len(TOKENS))
    assert_close(given, wanted, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_outgrows_its_room(family: str, tmp_path: Path) -> None:
    """A window moves through its room, and then to another."""
    model = compressed(tmp_path, family, grid="as stored")
    tokens = torch.arange(ROOM + 20) * 7 % 96
    with own_code(model) as own:
        given, cache = logits(model, tokens)
    assert own.call_count == 1
    wanted, wanted_cache = logits(reference(model), tokens)
    assert cache.get_seq_length() == PROMPT.numel() + len(tokens)
    assert_close(given, wanted, 1e-5)
    for layer, other in zip(cache.layers, wanted_cache.layers, strict=True):
        assert_close(layer.keys, other.keys, 1e-5)
        assert layer.get_seq_length() == other.get_seq_length()


@torch.no_grad()
def test_one_and_several_tokens_by_turns(tmp_path: Path) -> None:
    """Each goes on with what the other left of a window."""
    model = compressed(tmp_path, "gemma3", grid="as stored")
    plain, found = reference(model), []
    for each in (model, plain):
        cache, made = each(PROMPT).past_key_values, []
        for count in (1, 1, 4, 1, 1, 1, 6, 1, 1):
            tokens = torch.arange(count)[None] * 11 + len(made)
            made.append(each(tokens, past_key_values=cache).logits[0, -1])
        found.append(torch.stack(made))
    assert_close(*found, 1e-5)


def test_generation_says_the_same(model: Any) -> None:
    told = {"max_new_tokens": 30, "do_sample": False}
    with own_code(model) as own:
        given = model.generate(PROMPT, **told)
    assert own.call_count == 1
    assert torch.equal(given, reference(model).generate(PROMPT, **told))


CONTINUED: dict[str, Callable[[Any], Any]] = {
    "a copy": copy.deepcopy,
    "another cache of the same tensors": lambda cache: DynamicCache(
        [(layer.keys, layer.values) for layer in cache.layers]
    ),
    "cropped": lambda cache: cache.crop(-3) or cache,
}


@pytest.mark.parametrize("how", CONTINUED)
def test_a_cache_is_gone_on_with_twice(how: str, tmp_path: Path) -> None:
    """What one goes on with does not change what the other has."""
    model = compressed(tmp_path, grid="as stored")
    plain = reference(model)
    both = []
    for each in (model, plain):
        _, cache = logits(each, TOKENS)
        before = [layer.keys[:, :, :10].clone() for layer in cache.layers]
        views = [layer.keys[:, :, :10] for layer in cache.layers]
        other = CONTINUED[how](cache)
        found = []
        with torch.no_grad():
            for token, one in ((4, cache), (50, other), (8, cache), (51, other)):
                found.append(each(torch.tensor([[token]]), past_key_values=one).logits[0, -1])
        if how != "cropped":
            assert all(map(torch.equal, before, views))
        both.append(torch.stack(found))
    assert_close(*both, 1e-5)


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)


def training(model: Any) -> None:
    model.train()


def own_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 0.5


def double(model: Any) -> None:
    model.double()


def with_adapters(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["v_proj", "gate_proj"], init_lora_weights=False), model
    )


@pytest.mark.parametrize("change", [hooked, training, own_forward, double, with_adapters])
def test_a_changed_model_goes_its_own_way(change: Callable[[Any], None], model: Any) -> None:
    logits(model, TOKENS)
    change(model)
    with own_code(model) as own:
        given, _ = logits(model, TOKENS)
    assert own.call_count == 1 + len(TOKENS)
    assert_close(given, logits(reference(model), TOKENS)[0], 1e-5)


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_that_is_back_is_taken_again(first: bool, model: Any) -> None:
    if first:
        logits(model, TOKENS)
    layer, other = model.model.layers[0], torch.nn.Linear(80, 172, bias=False)
    packed, layer.mlp.up_proj = layer.mlp.up_proj, other
    with own_code(model) as own:
        logits(model, TOKENS)
        assert own.call_count == 1 + len(TOKENS)
        layer.mlp.up_proj = packed
        logits(model, TOKENS)
    assert own.call_count == 2 + len(TOKENS)


def test_a_bias_that_is_taken_away(tmp_path: Path) -> None:
    model = compressed(tmp_path, grid="as stored")
    logits(model, TOKENS)
    model.model.layers[0].self_attn.q_proj.bias = None
    given, _ = logits(model, TOKENS)
    assert_close(given, logits(reference(model), TOKENS)[0], 1e-5)


def test_copies_and_pickles_are_as_quick(model: Any) -> None:
    logits(model, TOKENS)
    wanted, _ = logits(reference(model), TOKENS)
    # Nobody else's bytes: processes that are given a model pickle it.
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with own_code(other) as own:
            given, _ = logits(other, TOKENS)
        assert own.call_count == 1
        assert_close(given, wanted, 1e-5)


def test_a_model_goes_when_nobody_holds_it(tmp_path: Path) -> None:
    def used() -> weakref.ref[Any]:
        model = compressed(tmp_path)
        model.model.layers[0].register_forward_hook(lambda *_: model.config and None)
        logits(model, TOKENS)
        return weakref.ref(model)

    gone = used()
    gc.collect()
    assert gone() is None


def test_it_compiles(tmp_path: Path) -> None:
    model = compressed(tmp_path, grid="as stored")
    wanted, _ = logits(reference(model), TOKENS[:2])
    given, _ = logits(torch.compile(model, backend="eager"), TOKENS[:2])
    assert_close(given, wanted, 1e-5)


def test_a_hook_that_is_gone_is_no_matter(model: Any) -> None:
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    logits(model, TOKENS)
    handle.remove()
    with own_code(model) as own:
        logits(model, TOKENS)
    assert own.call_count == 1


def test_parameters_that_moved_are_found(tmp_path: Path) -> None:
    model = compressed(tmp_path, grid="as stored")
    logits(model, TOKENS)
    layer = model.model.layers[1]
    layer.input_layernorm.weight = torch.nn.Parameter(layer.input_layernorm.weight * 2)
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()
    with own_code(model) as own:
        given, _ = logits(model, TOKENS)
    assert own.call_count == 1
    assert_close(given, logits(reference(model), TOKENS)[0], 1e-5)


@pytest.mark.parametrize(
    "told",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"attention_mask": torch.tensor([[0, *[1] * 5]])},
    ],
)
def test_who_wants_more_gets_the_models_own(told: dict[str, Any], model: Any) -> None:
    wanted, _ = logits(reference(model), TOKENS[:1], **told)
    with own_code(model) as own:
        given, _ = logits(model, TOKENS[:1], **told)
        assert own.call_count == 2
        assert_close(given, wanted, 1e-5)
        logits(model, TOKENS)  # what was asked for once is not asked for ever
    assert own.call_count == 3


@torch.no_grad()
def test_a_decoder_by_itself_gives_what_it_is_asked_for(model: Any) -> None:
    decoder, token = model.get_decoder(), torch.tensor([[3]])
    cache = decoder(PROMPT, use_cache=True).past_key_values
    assert isinstance(decoder(token, past_key_values=cache, return_dict=False), tuple)
    given = decoder(token, past_key_values=cache, use_cache=False)
    assert given.past_key_values is cache
    assert cache.get_seq_length() == PROMPT.numel() + 2
    assert decoder(token, past_key_values=cache).last_hidden_state.shape == (1, 1, 80)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_cache_in_another_dtype(part: str, model: Any) -> None:
    _, cache = logits(model, TOKENS)
    setattr(cache.layers[1], part, getattr(cache.layers[1], part).double())
    with own_code(model) as own, torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        model(torch.tensor([[3]]), past_key_values=cache)
    assert own.call_count == 1


def test_caches_of_other_kinds_and_batches(model: Any) -> None:
    static = StaticCache(config=model.config, max_cache_len=64)
    with own_code(model) as own:
        logits(model, TOKENS, static)
        assert own.call_count == 1 + len(TOKENS)
        with torch.no_grad():
            cache = model(PROMPT.repeat(2, 1)).past_key_values
            model(torch.tensor([[3], [4]]), past_key_values=cache)
        assert own.call_count == 3 + len(TOKENS)
        cache = model(PROMPT).past_key_values  # with gradients
        assert model(torch.tensor([[3]]), past_key_values=cache).logits.requires_grad == (
            model.lm_head.weight.requires_grad
        )
        assert own.call_count == 5 + len(TOKENS)


def test_windows_go_the_models_own_way(tmp_path: Path) -> None:
    """A cache that knows of no window, where the model has one, or of one whose past is kept."""
    with mock.patch.dict(CONFIGS, mistral=MistralConfig(**SIZES, sliding_window=8)):
        model = compressed(tmp_path, "mistral", grid="as stored")
    with own_code(model) as own:
        given, _ = logits(model, TOKENS, DynamicCache())
        assert own.call_count == 1 + 5  # from the ninth position on
    assert_close(given, logits(reference(model), TOKENS, DynamicCache())[0], 1e-5)
    with own_code(model) as own:
        given, cache = logits(model, TOKENS)
        assert own.call_count == 1
    assert_close(given, logits(reference(model), TOKENS)[0], 1e-5)
    for layer in cache.layers:
        layer.activate_past_recording()
    with own_code(model) as own, torch.no_grad():
        model(torch.tensor([[3]]), past_key_values=cache)
        assert own.call_count == 1


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3", "gemma3_text"])
def test_image_text_models(name: str, tmp_path: Path) -> None:
    """What goes around the decoder makes embeddings, and maybe masks."""
    dense = decoders.save(name, tmp_path / "dense")
    prune(dense, output=tmp_path / "pruned", method="magnitude", pattern="50%")
    compress(tmp_path / "pruned", tmp_path / "small")
    model = load_model(tmp_path / "small", "cpu")
    ids = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    told = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with own_code(model) as own:
        given = model.generate(ids, **told)
    assert own.call_count == 1
    wanted = reference(model).generate(ids, **told)
    assert torch.equal(given.sequences, wanted.sequences)
    assert_close(torch.stack(given.logits), torch.stack(wanted.logits), 1e-5)


def test_decoders_whose_code_is_the_same() -> None:
    """And no others: what they add, attention's shape or a factor, would be lost."""
    found = set()
    for name in decoders.NAMES:
        model = decoders.build(name)
        step_by_step(model)
        if "forward" in vars(model.get_decoder()):
            found.add(name)
    assert found == {
        *("internlm3", "iquestcoder", "llama", "llava", "mistral", "mistral3", "qwen2", "qwen3"),
        *("gemma3", "gemma3_text", "granite", "smollm3"),
    }


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(value: float, part: str, model: Any) -> None:
    _, cache = logits(model, TOKENS)
    getattr(cache.layers[1], part)[0, 0, 2] = value
    with own_code(model) as own, torch.no_grad():
        given = model(torch.tensor([[3]]), past_key_values=cache).logits
    assert own.call_count == 0
    assert not given.isfinite().any()


def test_a_servers_threads(model: Any) -> None:
    """Several conversations at once are what they are one after another."""
    texts = [(TOKENS * factor) % 96 for factor in range(1, 9)]
    wanted = [logits(model, text)[0] for text in texts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: logits(model, text)[0], texts))
    for given, alone in zip(found, wanted, strict=True):
        assert_close(given, alone, 1e-6)
