"""Products with a block's matrices, seen wherever its code makes them: in a module of its own or not.

Blocks multiply by linear layers, by parameters of their own, and by single experts of parameters that hold
many. What all of it comes to are a few of torch's functions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Told = Callable[[str, int | None, Tensor], Tensor | None]


class Place(NamedTuple):
    """Where a matrix lies."""

    weight: str
    """The parameter."""
    expert: int | None
    """Which of those that the parameter holds, in a dimension of their own or below each other; None if it
    holds one, or if all are multiplied by at once."""
    transposed: bool
    """Stored (in, out)."""


class Multiplication(NamedTuple):
    """A call of a function of torch that multiplies by a weight."""

    given: Tensor
    """(..., in), or (experts, tokens, in)."""
    weight: Tensor
    """(out, in), or (experts, out, in)."""
    bias: Tensor | None


def as_multiplication(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Multiplication | None:
    """What a call of a function multiplies, if that is what it does."""
    if func is functional.linear:
        bound = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        return Multiplication(bound["input"], bound["weight"], bound.get("bias"))
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return Multiplication(args[1], args[2].mT, args[0])
    if func in _MULTIPLY and len(args) == 2 and args[1].ndim in (2, 3):
        return Multiplication(args[0], args[1].mT, None)
    return None


_MULTIPLY = (
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
)


def storage_of(tensor: Tensor) -> int:
    """A number that a tensor and its views share with no other."""
    return tensor.untyped_storage()._cdata


class Parameters:
    """Finds which of some parameters a tensor is a view of.

    Args:
        named: the parameters.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = named
        self._by_storage = {storage_of(parameter): name for name, parameter in named.items()}

    def place(self, weight: Tensor) -> Place | None:
        """Where a weight (out, in), or (experts, out, in), lies, if it is a matrix of these parameters."""
        name = self._by_storage.get(storage_of(weight))
        if name is None or self._named[name].ndim not in (2, 3):
            return None
        parameter = self._named[name]
        beyond = int(weight.storage_offset()) - int(parameter.storage_offset())
        for stored, transposed in ((weight, False), (weight.mT, True)):
            rows, columns = stored.shape[-2:]
            if stored.stride()[-2:] != (columns, 1) or columns != parameter.shape[-1]:
                continue
            # Experts' matrices may lie below each other in a parameter of two dimensions.
            if parameter.shape[-2] % rows if parameter.ndim == 2 else parameter.shape[-2] != rows:
                continue
            if stored.shape == parameter.shape and not beyond:
                return Place(name, None, transposed)
            if weight.ndim == 2 and beyond % weight.numel() == 0:
                return Place(name, beyond // weight.numel(), transposed)
        return None


class Watch(TorchFunctionMode):
    """Shows the products with a block's matrices as it runs.

    Args:
        named: the block's parameters, as it runs with them.
        before: called with the parameter, the expert if there are several, and what is multiplied (..., in).
            What it raises ends the run.
        after: called with the same names and the product (..., out). What it gives, if anything, takes the
            product's place.
    """

    def __init__(self, named: Mapping[str, Tensor], before: Told, after: Told) -> None:
        super().__init__()
        self._parameters, self._before, self._after = Parameters(named), before, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        multiplication = as_multiplication(func, args, kwargs)
        place = None if multiplication is None else self._parameters.place(multiplication.weight)
        if multiplication is None or place is None:
            return func(*args, **kwargs)
        together = place.expert is None and multiplication.weight.ndim == 3
        _tell(self._before, place, multiplication.given, together)
        result = func(*args, **kwargs)
        return _tell(self._after, place, result, together)


def _tell(told: Told, place: Place, tensor: Tensor, together: bool) -> Tensor:
    """What is to take the tensor's place, mostly the tensor itself."""
    if not together:
        other = told(place.weight, place.expert, tensor)
        return tensor if other is None else other
    others = [told(place.weight, expert, part) for expert, part in enumerate(tensor)]
    if all(other is None for other in others):
        return tensor
    return torch.stack([part if other is None else other for part, other in zip(tensor, others, strict=True)])
