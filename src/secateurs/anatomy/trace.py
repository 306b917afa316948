"""Run a block whose matrices hold nothing, and write down what multiplies what.

A block's structure does not depend on its weights. So its matrices stay on the meta device, where they take
no memory and are never read: whatever multiplies one of them gets random numbers of the right shape instead
of the product, as a new leaf of autograd. From there on the block's code runs for real, in a fraction of a
second whatever the model's size, and autograd knows what each product's input was made of.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateurs.anatomy.experts import ONE_BY_ONE
from secateurs.anatomy.matrix import Matrix
from secateurs.anatomy.products import Multiplication, Parameters, Place, as_multiplication, storage_of

TRACE = "secateurs_trace"
"""What the implementation of attention that is run here is registered as."""


@dataclass(eq=False)
class Product:
    """Of a matrix of the block with something that its code computed."""

    matrix: Matrix
    given: Tensor
    """(..., in), or in a product of all experts at once (experts, tokens, in)."""
    result: Tensor
    """A random leaf of autograd in the product's place, (..., out)."""


class AttentionCall(NamedTuple):
    """What transformers' attention interface is called with, and gives."""

    query: Tensor
    """(batch, heads, tokens, head_dim)."""
    key: Tensor
    """(batch, key-value heads, tokens, head_dim)."""
    value: Tensor
    """(batch, key-value heads, tokens, value's head_dim)."""
    result: Tensor
    """(batch, tokens, heads, value's head_dim)."""


@dataclass
class Trace:
    """A block's run."""

    block: nn.Module
    """The copy that was run; its matrices are on the meta device."""
    given: Tensor
    """The hidden states that it was given."""
    result: Tensor
    """Those that it gave."""
    products: list[Product] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)
    real: frozenset[str] = frozenset()
    """Parameters of more than one dimension that are more than multiplied by; filled with random numbers."""


class Call(NamedTuple):
    """What a block is called with: hidden states first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _MoreReal(Exception):  # noqa: N818 - not an error: the run begins again
    """Parameters that are used otherwise than as matrices."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


def trace_block(block: nn.Module, call: Call) -> Trace:
    """Run a copy of a block.

    Args:
        block: on the meta device, but for buffers that are computed and not stored.
        call: as `note_calls` notes it.
    """
    convolutions = {
        f"{name}.weight"
        for name, module in block.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    real = {name for name, p in block.named_parameters() if p.ndim < 2 or name in convolutions}
    while True:
        try:
            return _run(copy.deepcopy(block), call, real)
        except _MoreReal as found:
            real |= found.names


def _run(block: nn.Module, call: Call, real: set[str]) -> Trace:
    generator = torch.Generator().manual_seed(0)
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if f"{module_name}.{name}".removeprefix(".") in real:
                values = torch.rand(parameter.shape, generator=generator) + 0.5
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # stored, so that any value may be there
                values = torch.rand(buffer.shape, generator=generator) + 0.5
                setattr(module, name, values.to(buffer.dtype))
    virtual = _Virtual(block, generator)

    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return copy.copy(value) if isinstance(value, dict) else value

    first, *args = pytree.tree_map(fresh, call.args)
    kwargs = pytree.tree_map(fresh, call.kwargs)
    given = torch.randn(first.shape, generator=generator).requires_grad_()
    with torch.enable_grad(), virtual, _recording(virtual):
        result = block(given, *args, **kwargs)
    if virtual.misused:
        raise _MoreReal(virtual.misused)
    result = result[0] if isinstance(result, tuple) else result
    many = frozenset(name for name in real if block.get_parameter(name).ndim > 1)
    return Trace(block, given, result, virtual.products, virtual.attention, many)


class Virtual(TorchFunctionMode):
    """Lets code run in which some tensors are on the meta device and most are not.

    What such a tensor says of itself is true but for its device. Together with real tensors it gives real
    random numbers of the shape that the result would have.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        virtual = [tensor for tensor in tensors if tensor.is_meta]
        if not virtual:
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu")
        if len(virtual) == len(tensors):
            return self.derived(func, virtual, func(*args, **kwargs))
        return self.mixed(func, args, kwargs, virtual)

    def derived(self, func: Any, virtual: list[Tensor], result: Any) -> Any:
        """What was made of tensors that are all virtual."""
        return result

    def mixed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], virtual: list[Tensor]) -> Any:
        """What stands for the result of a function of virtual and real tensors."""
        args, kwargs = pytree.tree_map(_to_meta, (args, kwargs))
        return pytree.tree_map(self.made_up, func(*args, **kwargs))

    def made_up(self, tensor: Any) -> Any:
        """Random numbers in a tensor's place."""
        if not isinstance(tensor, Tensor):
            return tensor
        if not tensor.dtype.is_floating_point:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype)


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return value.detach().to("meta") if isinstance(value, Tensor) else value


class _Virtual(Virtual):
    """Writes down the products with a block's virtual parameters."""

    def __init__(self, block: nn.Module, generator: torch.Generator) -> None:
        super().__init__(generator)
        self.products: list[Product] = []
        self.attention: list[AttentionCall] = []
        self.misused: set[str] = set()
        named = {name: p for name, p in block.named_parameters() if p.is_meta}
        self._parameters = Parameters(named)
        self._names = {id(p): name for name, p in block.named_parameters()}
        # Of what is computed of parameters, as of themselves: which ones.
        self._sources = {storage_of(p): {name} for name, p in named.items()}
        self._kept: list[Tensor] = []  # so that no storage's number is given out again

    def derived(self, func: Any, virtual: list[Tensor], result: Any) -> Any:
        if func is Tensor.float:  # in another dtype it is no view
            result = result.clone()
        sources = set().union(*(self._sources.get(storage_of(tensor), set()) for tensor in virtual))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._kept.append(tensor)
                self._sources.setdefault(storage_of(tensor), set()).update(sources)
        return result

    def mixed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], virtual: list[Tensor]) -> Any:
        result = super().mixed(func, args, kwargs, virtual)
        product = as_multiplication(func, args, kwargs)
        place = None
        if product is not None and not product.given.is_meta and isinstance(result, Tensor):
            place = self._parameters.place(product.weight)
        if product is None or place is None:
            for tensor in virtual:
                self.misused |= self._sources.get(storage_of(tensor), set())
            return result
        result.requires_grad_()
        self.products.append(Product(self._matrix(product, place), product.given, result))
        return result.clone()  # the block may write into it

    def _matrix(self, product: Multiplication, place: Place) -> Matrix:
        path, _, leaf = place.weight.rpartition(".")
        out, width = product.weight.shape[-2:]
        return Matrix(
            name=path if leaf == "weight" else place.weight,
            weight=place.weight,
            shape=(out, width),
            bias=self._name_of(product.bias),
            transposed=place.transposed,
            expert=place.expert,
        )

    def _name_of(self, bias: Tensor | None) -> str | None:
        if bias is None or not bias.is_meta:
            return self._names.get(id(bias))
        return min(self._sources.get(storage_of(bias), set()), default=None)


_recorder: _Virtual | None = None


@contextmanager
def _recording(virtual: _Virtual) -> Iterator[None]:
    """Attention and experts tell this one."""
    global _recorder
    _recorder = virtual
    try:
        yield
    finally:
        _recorder = None


@contextmanager
def implemented_here(model: nn.Module) -> Iterator[None]:
    """A model's attention and experts run by the implementations of this file."""
    names = {"_attn_implementation_internal": TRACE, "_experts_implementation_internal": ONE_BY_ONE}
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(getattr(module, "config", None), PretrainedConfig)
    }
    before = [(config, name, getattr(config, name, None)) for config in configs.values() for name in names]
    for config, name, _ in before:
        setattr(config, name, names[name])
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
    kwargs = {"scaling": query.shape[-1] ** -0.5, "dropout": 0.0, **kwargs}
    result, weights = own(module, query, key, value, mask, **kwargs)
    if _recorder is not None:
        _recorder.attention.append(AttentionCall(query, key, value, result))
    return result, weights


ALL_ATTENTION_FUNCTIONS.register(TRACE, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(TRACE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
