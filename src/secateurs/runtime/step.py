"""A compressed model's next token on the CPU: all blocks in one call of C++ (step.cpp).

With few bits a weight the products of a token are done so soon that what transformers does between them takes
about as long. A decoder whose parts are word for word Llama's, or those of others that differ by little
(`KNOWN`), does in one call what would be a thousand: one token, with the keys and values of those before it
in the same `DynamicCache`. All else goes the model's own way: prompts, batches, padding, gradients, hooks,
adapters, other devices.
"""

import ctypes
import functools
import inspect
import operator
import weakref
from dataclasses import dataclass
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from secateurs.native import function
from secateurs.runtime.cpu import DTYPE_CODES, cpu_kernels, grid_of, parts_of
from secateurs.runtime.linear import SparseLinear

ROOM = 256
"""Positions that there is room for behind a cache's own when it is moved to where it can grow in place."""

UNDERSTOOD = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"),
    *("cache_position", "return_dict"),
}
"""What a decoder is told. Anything else has to say no, or nothing."""

KNOWN: dict[str, tuple[type[nn.Module], ...]] = {
    "decoder": (
        *(llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen3.Qwen3Model),
        *(granite.GraniteModel, smollm3.SmolLM3Model, gemma3.Gemma3TextModel),
    ),
    "layer": (llama.LlamaDecoderLayer, granite.GraniteDecoderLayer, gemma3.Gemma3DecoderLayer),
    "attention": (
        *(llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention),
        *(smollm3.SmolLM3Attention, gemma3.Gemma3Attention),
    ),
    "mlp": (llama.LlamaMLP,),
    "norm": (llama.LlamaRMSNorm, gemma3.Gemma3RMSNorm),
}
"""The parts that are understood; what is word for word one of them is."""

SILU = (nn.SiLU, SiLUActivation)
LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Of a cache."""

ATTENTIONS = ("eager", "sdpa")
"""Implementations that all compute the same."""

CAPTURE = "transformers.utils.output_capturing"
"""Whose hooks stay where they once were asked for more, and do nothing unless they are again."""


def step_by_step(model: PreTrainedModel) -> None:
    """Let a model of packed layers make single tokens by one call, where its code and the machine allow it.

    Args:
        model: changed in place. Its parameters may still be moved or replaced, and its layers adapted: it is
            looked at anew each time.
    """
    decoder: Any = model.get_decoder()
    if _is_known(decoder):
        decoder.forward = _Forward(decoder)


class _Forward:
    """A decoder's forward pass. It keeps its decoder no longer than others do, and goes into copies of it."""

    def __init__(self, decoder: Any) -> None:
        functools.update_wrapper(self, type(decoder).forward)
        self._decoder = weakref.ref(decoder)
        self._step: _Step | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self._decoder(),)

    def __call__(self, *args: Any, **told: Any) -> Any:
        decoder: Any = self._decoder()
        if args or torch.compiler.is_compiling():
            return type(decoder).forward(decoder, *args, **told)
        hidden = self._stepped(decoder, told)
        if hidden is None:
            return type(decoder).forward(decoder, **told)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=told["past_key_values"])

    def _stepped(self, decoder: Any, told: dict[str, Any]) -> Tensor | None:
        """The decoder's output for one token, (1, 1, width); None where its own code is to make it."""
        if torch.is_grad_enabled() or decoder.training or not self._is_plain(decoder.config, told):
            return None
        step = self._step
        if step is None or not step.still_so:
            step = self._step = _Step(decoder)
        if not step.fits or step.is_heard:
            return None
        cache, mask, positions = (
            told.get(name) for name in ("past_key_values", "attention_mask", "position_ids")
        )
        length = step.length_of(cache)
        if length is None:
            return None
        if isinstance(mask, Tensor) and (mask.shape != (1, length + 1) or not mask.all()):
            return None
        if isinstance(mask, dict) and not all(map(_hides_nothing, mask.values())):
            return None
        if positions is None:
            positions = torch.tensor([[length]])
        hidden: Tensor | None = told.get("inputs_embeds")
        hidden = (
            decoder.embed_tokens(told["input_ids"])
            if hidden is None
            else hidden.clone(memory_format=torch.contiguous_format)
        )
        if step.embedded is not None:
            hidden = hidden * step.embedded
        kinds = {kind for kind in step.turned if kind is not None}
        angles = {kind: decoder.rotary_emb(hidden, positions, *kind) for kind in kinds}
        turns = (1, 1, step.shape.head_size)
        both = [each for pair in angles.values() for each in pair]
        if not all(each.is_cpu and each.dtype == step.dtype for each in (hidden, *both)):
            return None
        if any(each.shape != turns or not each.is_contiguous() for each in both):
            return None
        step.run(cache, hidden, [None if kind is None else angles[kind] for kind in step.turned])
        return hidden

    @staticmethod
    def _is_plain(config: Any, told: dict[str, Any]) -> bool:
        """Whether a decoder is asked for its next state and nothing else, given a token of one sequence, or
        the embedding that an image-text model has made of it."""
        ids, made, mask = (told.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        cached, in_a_dict = told.get("use_cache"), told.get("return_dict")
        given = made if ids is None else ids
        return (
            isinstance(given, Tensor)
            and given.shape[:2] == (1, 1)
            and (ids is None or made is None)
            and (mask is None or isinstance(mask, Tensor | dict))
            and bool(config.use_cache if cached is None else cached)
            and bool(config.return_dict if in_a_dict is None else in_a_dict)
            and config._attn_implementation in ATTENTIONS
            and all(each is None or each is False for name, each in told.items() if name not in UNDERSTOOD)
        )


class _Linear(ctypes.Structure):
    """A packed matrix, as step.cpp has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mask", "values", "scales", "offsets", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("dtype", "bits", "group", "half")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("from_one", ctypes.c_int32))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _Norm) for name in ("attended_norm", "mlp_made_norm")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("room", "length")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        *((name, ctypes.c_float) for name in ("scaling", "residual")),
    )


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("blocks", "width", "channels", "heads", "key_heads", "head_size", "gelu")
    )


@dataclass
class _Grown:
    """Keys and values of a cache's layer, (1, heads, room, head size): it has those from `begin` to `end`."""

    keys: Tensor
    values: Tensor
    begin: int
    end: int

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """What the layer has."""
        return self.keys[:, :, self.begin : self.end], self.values[:, :, self.begin : self.end]


_GROWN: WeakKeyDictionary[DynamicLayer, _Grown] = WeakKeyDictionary()


def _with_room(layer: Any) -> _Grown:
    """Where the next position of a layer can be put without moving the others.

    What a layer's keys and values were before stays as it is: others may hold it.
    """
    length = layer.keys.shape[2]
    grown = _GROWN.get(layer)
    if (
        grown is None
        or grown.end - grown.begin != length
        or grown.keys.shape[2] == grown.end
        or [each.data_ptr() for each in grown.held] != [layer.keys.data_ptr(), layer.values.data_ptr()]
    ):
        grown = _GROWN[layer] = _Grown(_roomy(layer.keys), _roomy(layer.values), 0, length)
        layer.keys, layer.values = grown.held
    return grown


def _roomy(held: Tensor) -> Tensor:
    length = held.shape[2]
    roomy = held.new_empty(*held.shape[:2], length + max(ROOM, length // 2), held.shape[3])
    roomy[:, :, :length] = held
    return roomy


class _Step:
    """What step.cpp has to know of a decoder, if it can do it, and how to tell that it is still so."""

    def __init__(self, decoder: Any) -> None:
        # What is called as a module may be anything; all else is known by where it lies.
        called = {decoder.embed_tokens, decoder.rotary_emb}
        modules = [module for module in decoder.modules() if module is not decoder and module not in called]
        held = [(each._modules, name) for each in (decoder, *modules) for name in each._modules]
        self._tensors: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    (held if tensor is None else self._tensors).append((tensors, name))
        self._held, self._holds = held, [where[name] for where, name in held]
        self._places = [where[name].data_ptr() for where, name in self._tensors]
        self._own = [vars(module) for module in modules]
        self._hooks = [
            hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        try:
            self._describe(decoder)
            self.fits = True
        except (ValueError, AttributeError):  # another device, a layer that is not packed or not as it was
            self.fits = False

    def _describe(self, decoder: Any) -> None:
        kernels = cpu_kernels()
        layers, config = list(decoder.layers), decoder.config
        attention, mlp = layers[0].self_attn, layers[0].mlp
        if kernels is None or not _is_known(decoder) or decoder.norm.weight.dtype not in DTYPE_CODES:
            raise ValueError
        self._isa = kernels.isa
        self.dtype = decoder.norm.weight.dtype
        self._run = function(
            "runtime._kernels",
            "secateurs_step",
            [ctypes.c_void_p] * 4 + [ctypes.c_int32] * 3,
            without="single tokens go through transformers' own code",
        )
        size = attention.head_dim
        self.shape = _Shape(
            blocks=len(layers),
            width=attention.q_proj.in_features,
            channels=mlp.gate_proj.out_features,
            heads=attention.q_proj.out_features // size,
            key_heads=attention.k_proj.out_features // size,
            head_size=size,
            gelu=not isinstance(mlp.act_fn, SILU),
        )
        by_type = _alike(decoder, gemma3.Gemma3TextModel)
        self.embedded: float | None = getattr(decoder, "embedding_multiplier", None)
        """What embeddings are multiplied by, if they are."""
        self.turned = [
            None if not getattr(layer.self_attn, "use_rope", True) else (kind,) if by_type else ()
            for layer, kind in zip(layers, getattr(config, "layer_types", None) or layers, strict=True)
        ]
        """For each block, what tells its angles from others'; None where heads are not turned."""
        window = getattr(config, "sliding_window", None)
        self.windows: list[int | None] = [
            getattr(layer.self_attn, "sliding_window", window) for layer in layers
        ]
        """For each block, how many positions are seen, the token's own among them."""
        self._norm = self._norm_of(decoder.norm)
        self._blocks = (_Block * len(layers))(*(self._block_of(layer) for layer in layers))

    @property
    def still_so(self) -> bool:
        """Whether all that this knows is where it was."""
        try:  # with lists, which takes far less time than one by one: it is asked for every token
            return (
                all(map(operator.is_, [where[name] for where, name in self._held], self._holds))
                and [where[name].data_ptr() for where, name in self._tensors] == self._places
                and not any("forward" in own for own in self._own)
            )
        except (KeyError, AttributeError):
            return False

    @property
    def is_heard(self) -> bool:
        """Whether a hook of a layer wants to be called."""
        heard = (hook for hooks in self._hooks if hooks for hook in hooks.values())
        return _has_any_global_hook() or any(getattr(hook, "__module__", "") != CAPTURE for hook in heard)

    def length_of(self, cache: Any) -> int | None:
        """The positions of a cache that can be gone on with, else None."""
        if type(cache) is not DynamicCache or len(cache.layers) != self.shape.blocks:
            return None
        held: list[Any] = cache.layers
        if not all(type(each) in LAYERS and each.is_initialized for each in held):
            return None
        length = int(held[0].get_seq_length())
        for layer, window in zip(held, self.windows, strict=True):
            kept = length
            if type(layer) is DynamicSlidingWindowLayer:
                if layer.sliding_window != window or layer.record_past:
                    return None
                kept = min(length, window - 1)
            elif window is not None and length >= window:
                return None
            shape = (1, self.shape.key_heads, kept, self.shape.head_size)
            for each in (layer.keys, layer.values):
                if each.shape != shape or each.dtype != self.dtype or not each.is_cpu:
                    return None
            if layer.get_seq_length() != length:
                return None
        return length

    def run(self, cache: Any, hidden: Tensor, angles: list[tuple[Tensor, Tensor] | None]) -> None:
        """One token: `hidden` (1, 1, width) becomes the output, and the cache has a position more."""
        held: list[Any] = cache.layers
        grown = [_with_room(layer) for layer in held]
        blocks = type(self._blocks).from_buffer_copy(self._blocks)  # a server's threads have a cache each
        for block, one, turned in zip(blocks, grown, angles, strict=True):
            block.keys, block.values = (each.data_ptr() for each in one.held)
            block.room, block.length = one.keys.shape[2], one.end - one.begin
            if turned is not None:
                block.cosines, block.sines = (each.data_ptr() for each in turned)
        self._run(
            ctypes.addressof(blocks),
            ctypes.addressof(self.shape),
            ctypes.addressof(self._norm),
            hidden.data_ptr(),
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            self._isa,
        )
        for layer, one in zip(held, grown, strict=True):
            one.end += 1
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length += 1
                one.begin = max(one.begin, one.end - layer.sliding_window + 1)
            layer.keys, layer.values = one.held

    def _block_of(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        norms = [getattr(owner, name) if name else None for owner, name in _norms_of(layer)]
        of = self.shape
        queries, keys = of.heads * of.head_size, of.key_heads * of.head_size
        inner = [(queries, of.width), (keys, of.width), (keys, of.width), (of.width, queries)]
        outer = [(of.channels, of.width), (of.channels, of.width), (of.width, of.channels)]
        if [linear.layout.shape for linear in linears] != inner + outer:
            raise ValueError
        return _Block(
            *(self._linear_of(linear) for linear in linears),
            *(self._norm_of(norm) for norm in norms),
            scaling=attention.scaling,
            residual=getattr(layer, "residual_multiplier", 1.0),
        )

    def _linear_of(self, linear: nn.Module) -> _Linear:
        if type(linear) is not SparseLinear:
            raise ValueError
        if not all(each is None or each.is_cpu for each in (linear.weight, linear.offsets, linear.bias)):
            raise ValueError
        if linear.bias is not None and linear.bias.dtype != self.dtype:
            raise ValueError
        layout = linear.layout
        mask, values, scales = parts_of(linear.weight, layout)
        coded = layout.codes is not None
        return _Linear(
            *(mask, values, scales if coded else None, linear.offsets.data_ptr()),
            None if linear.bias is None else linear.bias.data_ptr(),
            *(layout.rows, layout.columns, DTYPE_CODES[layout.dtype]),
            *(grid_of(layout) if coded else (0, 0, 0)),
        )

    def _norm_of(self, norm: Any) -> _Norm:
        if norm is None:
            return _Norm()
        if norm.weight.dtype != self.dtype or not norm.weight.is_cpu or not norm.weight.is_contiguous():
            raise ValueError
        if _alike(norm, gemma3.Gemma3RMSNorm):
            return _Norm(norm.weight.data_ptr(), norm.eps, True)
        return _Norm(norm.weight.data_ptr(), norm.variance_epsilon, False)


def _hides_nothing(mask: Any) -> bool:
    """Whether a token sees all positions by the mask (1, 1, 1, positions) that an image-text model makes."""
    if not isinstance(mask, Tensor):
        return mask is None
    return mask.shape[:3] == (1, 1, 1) and bool(mask.all() if mask.dtype == torch.bool else not mask.any())


def _norms_of(layer: Any) -> list[tuple[Any, str | None]]:
    """Where a layer has the norms of a `_Block`, in their order; None for those that it does without."""
    attention = layer.self_attn
    between = _alike(layer, gemma3.Gemma3DecoderLayer)
    return [
        (layer, "input_layernorm"),
        (layer, "pre_feedforward_layernorm" if between else "post_attention_layernorm"),
        *((attention, name if hasattr(attention, name) else None) for name in ("q_norm", "k_norm")),
        (layer, "post_attention_layernorm" if between else None),
        (layer, "post_feedforward_layernorm" if between else None),
    ]


def _is_known(decoder: Any) -> bool:
    """Whether a decoder and all parts of its blocks are word for word known ones."""
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not _alike(decoder, *KNOWN["decoder"]):
        return False
    blocks: list[Any] = list(layers)
    if len(blocks) != decoder.config.num_hidden_layers or not _alike(decoder.norm, *KNOWN["norm"]):
        return False
    if getattr(decoder.config, "use_bidirectional_attention", False):
        return False
    if any("forward" in vars(module) for layer in blocks for module in layer.modules()):
        return False
    if not all(map(_is_known_layer, blocks)):
        return False
    return len({isinstance(layer.mlp.act_fn, SILU) for layer in blocks}) == 1


def _is_known_layer(layer: Any) -> bool:
    if not _alike(layer, *KNOWN["layer"]):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if not _alike(attention, *KNOWN["attention"]) or not _alike(mlp, *KNOWN["mlp"]):
        return False
    if not isinstance(mlp.act_fn, (*SILU, GELUTanh)):
        return False
    norms = [getattr(owner, name) for owner, name in _norms_of(layer) if name]
    return all(_alike(norm, *KNOWN["norm"]) for norm in norms)


def _alike(module: Any, *known: Any) -> bool:
    """Whether a module's forward pass, and what it calls of its file's, is word for word a known class's."""
    kind: Any = type(module)
    return any(_words(kind) == _words(one) for one in known)


@functools.cache
def _words(kind: Any) -> tuple[Any, ...]:
    forward: Any = inspect.unwrap(kind.forward)
    called = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward")
    return (
        _code(forward.__code__),
        *(
            _code(inspect.unwrap(forward.__globals__[name]).__code__)
            for name in called
            if kind.__name__.endswith("Attention") and name in forward.__globals__
        ),
    )


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a piece of code does, wherever it stands."""
    constants = (_code(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, *constants
