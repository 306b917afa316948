"""A compressed model's next token on the CPU: all blocks in one call of C++ (step.cpp).

With few bits a weight the products of a token are done so soon that what transformers does between them takes
about as long. A decoder whose code is Llama's word for word (or Mistral's, Qwen2's, Qwen3's: those of all the
families that were copied from them) does in one call what would be a thousand: one token, with the keys and
values of those before it in the same `DynamicCache`. All else goes the model's own way: prompts, batches,
padding, windows, gradients, hooks, adapters, other devices.
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
from transformers.activations import SiLUActivation
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

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
    if _is_llama(decoder):
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
        if length is None or (step.window is not None and length >= step.window):
            return None
        if isinstance(mask, Tensor) and (mask.shape != (1, length + 1) or not mask.all()):
            return None
        if positions is None:
            positions = torch.tensor([[length]])
        hidden: Tensor = decoder.embed_tokens(told["input_ids"])
        angles = decoder.rotary_emb(hidden, position_ids=positions)
        turns = (1, 1, step.shape.head_size)
        if not all(each.is_cpu and each.dtype == step.dtype for each in (hidden, *angles)):
            return None
        if any(each.shape != turns or not each.is_contiguous() for each in angles):
            return None
        step.run(cache, hidden, angles)
        return hidden

    @staticmethod
    def _is_plain(config: Any, told: dict[str, Any]) -> bool:
        """Whether a decoder is asked for its next state and nothing else, given a token of one sequence."""
        ids, mask = told.get("input_ids"), told.get("attention_mask")
        cached, in_a_dict = told.get("use_cache"), told.get("return_dict")
        return (
            isinstance(ids, Tensor)
            and ids.shape == (1, 1)
            and told.get("inputs_embeds") is None
            and (mask is None or isinstance(mask, Tensor))
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
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("room", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("blocks", "width", "channels", "heads", "key_heads", "head_size")
    )


@dataclass
class _Grown:
    """Keys and values of a cache's layer, (1, heads, room, head size), the first `length` of which it has."""

    keys: Tensor
    values: Tensor
    length: int


_GROWN: WeakKeyDictionary[DynamicLayer, _Grown] = WeakKeyDictionary()


def _with_room(layer: Any) -> _Grown:
    """Where the next position of a layer can be put without moving the others.

    What a layer's keys and values were before stays as it is: others may hold it.
    """
    length = layer.keys.shape[2]
    grown = _GROWN.get(layer)
    if (
        grown is None
        or grown.length != length
        or grown.keys.shape[2] == length
        or (grown.keys.data_ptr(), grown.values.data_ptr())
        != (layer.keys.data_ptr(), layer.values.data_ptr())
    ):
        grown = _GROWN[layer] = _Grown(_roomy(layer.keys), _roomy(layer.values), length)
        layer.keys, layer.values = grown.keys[:, :, :length], grown.values[:, :, :length]
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
        self.window: int | None = getattr(decoder.config, "sliding_window", None)
        """A length from which on not all positions are seen."""
        try:
            self._describe(decoder)
            self.fits = True
        except (ValueError, AttributeError):  # another device, a layer that is not packed or not as it was
            self.fits = False

    def _describe(self, decoder: Any) -> None:
        kernels = cpu_kernels()
        layers = decoder.layers
        attention, mlp = layers[0].self_attn, layers[0].mlp
        if kernels is None or not _is_llama(decoder) or decoder.norm.weight.dtype not in DTYPE_CODES:
            raise ValueError
        self._isa = kernels.isa
        self.dtype = decoder.norm.weight.dtype
        self._run = function(
            "runtime._kernels",
            "secateurs_step",
            [ctypes.c_void_p] * 6 + [ctypes.c_int64] + [ctypes.c_int32] * 3,
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
        )
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
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in held):
            return None
        if held[0].keys.dim() != 4:
            return None
        length = int(held[0].keys.shape[2])
        shape = (1, self.shape.key_heads, length, self.shape.head_size)
        alike = all(
            each.shape == shape and each.dtype == self.dtype and each.is_cpu
            for layer in held
            for each in (layer.keys, layer.values)
        )
        return length if alike else None

    def run(self, cache: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        """One token: `hidden` (1, 1, width) becomes the output, and the cache has a position more."""
        held: list[Any] = cache.layers
        length = int(held[0].keys.shape[2])
        grown = [_with_room(layer) for layer in held]
        blocks = type(self._blocks).from_buffer_copy(self._blocks)  # a server's threads have a cache each
        for block, one in zip(blocks, grown, strict=True):
            block.keys, block.values, block.room = (
                one.keys.data_ptr(),
                one.values.data_ptr(),
                one.keys.shape[2],
            )
        cosines, sines = angles
        self._run(
            ctypes.addressof(blocks),
            ctypes.addressof(self.shape),
            ctypes.addressof(self._norm),
            cosines.data_ptr(),
            sines.data_ptr(),
            hidden.data_ptr(),
            length,
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            self._isa,
        )
        for layer, one in zip(held, grown, strict=True):
            one.length = length + 1
            layer.keys, layer.values = one.keys[:, :, : length + 1], one.values[:, :, : length + 1]

    def _block_of(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )
        norms = (
            *(layer.input_layernorm, layer.post_attention_layernorm),
            *(getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)),
        )
        of = self.shape
        queries, keys = of.heads * of.head_size, of.key_heads * of.head_size
        inner = [(queries, of.width), (keys, of.width), (keys, of.width), (of.width, queries)]
        outer = [(of.channels, of.width), (of.channels, of.width), (of.width, of.channels)]
        if [linear.layout.shape for linear in linears] != inner + outer:
            raise ValueError
        return _Block(
            *(self._linear_of(linear) for linear in linears),
            *(self._norm_of(norm) for norm in norms),
            None,
            None,
            0,
            attention.scaling,
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
            return _Norm(None, 0.0)
        if norm.weight.dtype != self.dtype or not norm.weight.is_cpu or not norm.weight.is_contiguous():
            raise ValueError
        return _Norm(norm.weight.data_ptr(), norm.variance_epsilon)


def _is_llama(decoder: Any) -> bool:
    """Whether the code of a decoder and of all its blocks is Llama's, or that of another that is known."""
    decoders = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen3.Qwen3Model)
    attentions = (
        llama.LlamaAttention,
        mistral.MistralAttention,
        qwen2.Qwen2Attention,
        qwen3.Qwen3Attention,
    )
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not _alike(decoder, *decoders):
        return False
    blocks: list[Any] = list(layers)
    if len(blocks) != decoder.config.num_hidden_layers or not _alike(decoder.norm, llama.LlamaRMSNorm):
        return False
    if any("forward" in vars(module) for layer in blocks for module in layer.modules()):
        return False
    for layer in blocks:
        if not _alike(layer, llama.LlamaDecoderLayer):
            return False
        attention, mlp = layer.self_attn, layer.mlp
        if not _alike(attention, *attentions) or not _alike(mlp, llama.LlamaMLP):
            return False
        if not isinstance(mlp.act_fn, nn.SiLU | SiLUActivation):
            return False
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        if not all(_alike(norm, llama.LlamaRMSNorm) for norm in norms):
            return False
    return True


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
