"""Which stored tensors a parameter is made of: one expert's matrix in a file is a slice of a 3-D parameter.

No table of names or layouts is kept here. transformers' own loader is given tensors without content that
note, through whatever it stacks, concatenates, splits and transposes, which of their elements came to lie
where; so old names, prefixes and every conversion of every architecture are as from_pretrained has them, and
no memory is needed. What it computes with (adds to, say) has lost its way, and is an error.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.checkpoint.names import load_empty, promised_tensors
from secateurs.checkpoint.reading import Checkpoint

DTYPES = {
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}
"""By safetensors' names."""


class Piece(NamedTuple):
    """A stored tensor, or where a parameter is a part of it that part, and where it lies in the parameter.

    Both are strided views of contiguous tensors, of one shape, that hold the same elements. The shape is that
    of the stored tensor, unless the piece is a part of it, or lies in the parameter in more strides than that
    has sides.
    """

    stored: str
    """The tensor's name in the files."""
    dtype: torch.dtype
    """That it is stored in."""
    stored_shape: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of both views. Strides and offsets are in elements."""
    stored_stride: tuple[int, ...]
    stored_offset: int
    stride: tuple[int, ...]
    offset: int

    def of(self, parameter: Tensor) -> Tensor:
        """What belongs to it of a contiguous parameter: a view, for reading and writing alike."""
        assert parameter.is_contiguous(), "it has to be a contiguous parameter"
        assert tuple(parameter.shape) == self.parameter_shape
        return parameter.as_strided(self.shape, self.stride, parameter.storage_offset() + self.offset)

    def within(self, stored: Tensor) -> Tensor:
        """The same elements in the contiguous stored tensor: a view."""
        assert stored.is_contiguous(), "it has to be a contiguous tensor"
        assert tuple(stored.shape) == self.stored_shape
        return stored.as_strided(self.shape, self.stored_stride, stored.storage_offset() + self.stored_offset)

    @property
    def whole(self) -> bool:
        """Whether all of the stored tensor lies in this parameter."""
        return prod(self.shape) == prod(self.stored_shape)

    @property
    def alone(self) -> bool:
        """Whether the parameter is the stored tensor, at most of another shape."""
        if not self.whole or prod(self.shape) != prod(self.parameter_shape):
            return False
        return (
            torch.empty(self.stored_shape, device="meta").as_strided(self.shape, self.stride).is_contiguous()
        )


def pieces_of(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> dict[str, tuple[Piece, ...]]:
    """What every parameter and persistent buffer of a model is made of.

    Args:
        checkpoint: the model's files.
        skeleton: `skeleton_of(checkpoint)`.

    Returns:
        For every name in `skeleton.state_dict()` that the files hold, its pieces, disjoint and together all
        of it. Tied weights have the pieces of the one that is stored. What the files do not hold (a buffer
        that the model can do without) is absent.

    Raises:
        ValueError: what transformers makes of a tensor is more than a new place for its elements, or it makes
            use of a part of it only. Names it.
    """
    promised = promised_tensors(checkpoint, skeleton)
    shapes = {name: tensor.shape for name, tensor in promised.items()}
    traced = {name: _Traced.stored(name, shape) for name, shape in shapes.items()}
    model, _ = load_empty(type(skeleton), skeleton.config, traced)
    tensors = model.state_dict(keep_vars=True)
    found = {name: x for name, x in tensors.items() if isinstance(x, _Traced) and x.numel()}
    dtypes: dict[str, torch.dtype] = {}
    for name in {region.stored for tensor in found.values() for region in tensor.regions}:
        if promised[name].dtype not in DTYPES:
            raise ValueError(
                f"'{name}' in '{checkpoint.folder}' is of {promised[name].dtype}, no dtype of weights"
            )
        dtypes[name] = DTYPES[promised[name].dtype]
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, tensor in found.items():
        if sum(region.source.numel() for region in tensor.regions) != tensor.numel():
            raise ValueError(
                f"'{name}' of {type(skeleton).__name__} is computed from what '{checkpoint.folder}' holds, "
                "in a way that cannot be undone"
            )
        empty = torch.empty(tensor.shape, device="meta")
        pieces[name] = tuple(
            _piece(region, empty, shapes[region.stored], dtypes[region.stored]) for region in tensor.regions
        )
    used: Counter[str] = Counter()
    for name in {id(tensor): name for name, tensor in found.items()}.values():  # tied weights once
        for piece in pieces[name]:
            used[piece.stored] += prod(piece.shape)
    for stored, count in used.items():
        if count != prod(shapes[stored]):
            raise ValueError(
                f"'{stored}' in '{checkpoint.folder}' has {prod(shapes[stored])} elements, of which "
                f"{type(skeleton).__name__} uses {count}"
            )
    return pieces


def assemble(pieces: Iterable[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    """The parameter that stored tensors make, in their dtype; no copy where it is one of them as it is.

    Args:
        pieces: of the parameter.
        tensors: the stored tensors by name.
    """
    pieces = tuple(pieces)
    first = pieces[0]
    if len(pieces) == 1 and first.alone:
        return tensors[first.stored].reshape(first.parameter_shape)
    dtype = tensors[first.stored].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, tensors[piece.stored].dtype)
    parameter = torch.empty(first.parameter_shape, dtype=dtype, device=tensors[first.stored].device)
    for piece in pieces:
        piece.of(parameter).copy_(piece.within(tensors[piece.stored].contiguous()))
    return parameter


def take_apart(
    parameter: Tensor, pieces: Iterable[Piece], into: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The stored tensors that a parameter is made of, in the dtypes they are stored in.

    Args:
        parameter: all of it.
        pieces: of the parameter. One that is not `whole` fills its part of the stored tensor only: the
            parameters that hold the rest have to follow with the same `into`.
        into: stored tensors by name; None begins a new one.

    Returns:
        `into`. Its tensors may share memory with the parameter.
    """
    stored = {} if into is None else into
    parameter = parameter.detach().contiguous()
    for piece in pieces:
        if piece.whole:
            tensor = piece.of(parameter).to(piece.dtype)
            stored[piece.stored] = tensor.reshape(piece.stored_shape).contiguous()
        else:
            if piece.stored not in stored:
                stored[piece.stored] = torch.zeros(
                    piece.stored_shape, dtype=piece.dtype, device=parameter.device
                )
            piece.within(stored[piece.stored]).copy_(piece.of(parameter))
    return stored


class _Region(NamedTuple):
    """A box of a traced tensor, and the stored elements that came to lie there."""

    stored: str
    begin: tuple[int, ...]
    """The box's first corner."""
    source: Tensor
    """A view, of the box's shape, of an empty tensor on the meta device that stands for the stored one."""


class _Traced(Tensor):
    """A tensor without content that knows where its elements come from; no regions: that was lost.

    It calls itself contiguous whatever is done to it, so that `contiguous` and `reshape` cost nothing.
    """

    regions: tuple[_Region, ...]

    @staticmethod
    def __new__(cls, like: Tensor, regions: Iterable[_Region] = ()) -> "_Traced":
        traced: _Traced = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=torch.device("meta")
        )
        traced.regions = tuple(regions)
        return traced

    @classmethod
    def stored(cls, name: str, shape: Iterable[int]) -> "_Traced":
        """A tensor of the files."""
        source = torch.empty(tuple(shape), device="meta")
        return cls(source, [_Region(name, (0,) * source.dim(), source)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, cls):
                return torch.empty(x.shape, dtype=x.dtype, device="meta")
            return [plain(each) for each in x] if isinstance(x, list | tuple) else x

        def traced(result: Any, regions: Iterable[_Region] = ()) -> Any:
            return cls(result, regions) if isinstance(result, Tensor) else result

        kwargs = kwargs or {}
        results = func(*plain(args), **{name: plain(x) for name, x in kwargs.items()})
        if func._schema.is_mutable:
            for x in (*args, *kwargs.values()):
                if isinstance(x, cls):
                    x.regions = ()
            return args[0]
        follow = _FOLLOWED.get(func.overloadpacket)
        found = follow(results, *args, **kwargs) if follow else None
        if isinstance(results, list | tuple):
            return [traced(*pair) for pair in zip(results, found or [()] * len(results), strict=True)]
        return traced(results, found or ())


def _same_order(result: Tensor, x: _Traced, *_: Any, **__: Any) -> list[_Region]:
    """A new shape, or dtype, for the same elements in the same order."""
    shape, new = tuple(x.shape), tuple(result.shape)
    if shape == new:
        return list(x.regions)
    if [size for size in shape if size > 1] == [size for size in new if size > 1]:
        regions = []
        for region in x.regions:  # sides of 1 come and go
            wide = iter([i for i, size in enumerate(shape) if size > 1])
            sides = [next(wide) if size > 1 else None for size in new]
            begin = tuple(0 if side is None else region.begin[side] for side in sides)
            box = [1 if side is None else region.source.shape[side] for side in sides]
            regions.append(_Region(region.stored, begin, region.source.view(box)))
        return regions
    if len(x.regions) != 1 or x.regions[0].source.shape != shape:
        return []
    return list(_laid_out(x.regions[0].stored, x.regions[0].source, 0, new))


def _laid_out(stored: str, source: Tensor, start: int, shape: tuple[int, ...]) -> Iterator[_Region]:
    """Where a source's elements, in its order, lie in a shape if the first is element `start` of that."""
    count, strides = source.numel(), torch.empty(shape, device="meta").stride()
    begin = tuple(start // stride % size for size, stride in zip(shape, strides, strict=True))
    box = [min(size, max(1, count // stride)) for size, stride in zip(shape, strides, strict=True)]
    if prod(box) == count and all(b + n <= size for b, n, size in zip(begin, box, shape, strict=True)):
        try:
            yield _Region(stored, begin, source.view(box))
            return
        except RuntimeError:  # its strides do not allow it
            pass
    for i, part in enumerate(source):
        yield from _laid_out(stored, part, start + i * part.numel(), shape)


def _permuted(_: Tensor, x: _Traced, order: Iterable[int]) -> list[_Region]:
    order = [side % x.dim() for side in order]
    return [
        _Region(region.stored, tuple(region.begin[side] for side in order), region.source.permute(order))
        for region in x.regions
    ]


def _transposed(result: Tensor, x: _Traced, first: int = 0, second: int = 1) -> list[_Region]:
    order = list(range(x.dim()))
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return _permuted(result, x, order)


def _cut(x: _Traced, side: int, begin: int, end: int) -> _Traced:
    """From `begin` to `end` of a side."""
    shape = list(x.shape)
    shape[side] = end - begin
    regions = []
    for region in x.regions:
        first, last = region.begin[side], region.begin[side] + region.source.shape[side]
        low, high = max(first, begin), min(last, end)
        if low < high:
            at = (*region.begin[:side], low - begin, *region.begin[side + 1 :])
            source = region.source.narrow(side, low - first, high - low)
            regions.append(_Region(region.stored, at, source))
    return _Traced(torch.empty(shape, device="meta"), regions)


def _sliced(
    _: Tensor, x: _Traced, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> list[_Region]:
    begin, end, _step = slice(start, end).indices(x.shape[dim])
    return list(_cut(x, dim % x.dim(), begin, end).regions) if step == 1 else []


def _selected(result: Tensor, x: _Traced, dim: int, index: int) -> list[_Region]:
    index %= x.shape[dim]
    return _same_order(result, _cut(x, dim % x.dim(), index, index + 1))


def _split(results: Sequence[Tensor], x: _Traced, _: Any, dim: int = 0) -> list[list[_Region]]:
    ends = list(accumulate(result.shape[dim] for result in results))
    return [
        list(_cut(x, dim % x.dim(), begin, end).regions) for begin, end in zip([0, *ends], ends, strict=False)
    ]


def _unbound(results: Sequence[Tensor], x: _Traced, dim: int = 0) -> list[list[_Region]]:
    return [_selected(result, x, dim, i) for i, result in enumerate(results)]


def _concatenated(_: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> list[_Region]:
    regions, end = [], 0
    for x in tensors:
        for region in x.regions if isinstance(x, _Traced) else ():
            begin = list(region.begin)
            begin[dim] += end
            regions.append(region._replace(begin=tuple(begin)))
        end += x.shape[dim]
    return regions


def _stacked(result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> list[_Region]:
    dim %= result.dim()
    regions = []
    for i, x in enumerate(tensors):
        for region in x.regions if isinstance(x, _Traced) else ():
            begin = (*region.begin[:dim], i, *region.begin[dim:])
            regions.append(_Region(region.stored, begin, region.source.unsqueeze(dim)))
    return regions


_aten = torch.ops.aten
_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.alias, _aten.detach, _aten.clone, _aten._to_copy, _aten.lift_fresh), _same_order),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.squeeze, _aten.unsqueeze), _same_order),
    **dict.fromkeys((_aten.transpose, _aten.t), _transposed),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes), _split),
    _aten.permute: _permuted,
    _aten.slice: _sliced,
    _aten.select: _selected,
    _aten.unbind: _unbound,
    _aten.cat: _concatenated,
    _aten.stack: _stacked,
}
"""What moves elements about and does nothing else to them, by how it is followed."""


def _piece(region: _Region, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
    """A region of a whole parameter."""
    there, strides = region.source, parameter.stride()
    offset = sum(begin * stride for begin, stride in zip(region.begin, strides, strict=True))
    here = parameter.as_strided(there.shape, strides, offset)
    # By the stored tensor's sides.
    order = sorted(range(there.dim()), key=lambda side: -there.stride()[side])
    there, here = there.permute(order), here.permute(order)
    if there.numel() == prod(shape) and there.shape != shape:
        try:
            there, here = there.view(shape), here.view(shape)
        except RuntimeError:  # it lies in the parameter in more strides
            there = region.source.permute(order)
    return Piece(
        *(region.stored, dtype, tuple(shape), tuple(parameter.shape), tuple(there.shape)),
        *(there.stride(), int(there.storage_offset()), here.stride(), int(here.storage_offset())),
    )
