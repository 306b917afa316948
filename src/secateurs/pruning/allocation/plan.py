"""Who gets how much of the sparsity: all alike, each as a table or a rule says, or as a survey shows."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from secateurs.checkpoint import as_object, read_json
from secateurs.pattern import NM, Pattern, Unstructured, parse_pattern, share_of
from secateurs.pruning.allocation.owl import OWL
from secateurs.pruning.allocation.sensitivity import Sensitivity
from secateurs.pruning.allocation.survey import Allocator, Patterns
from secateurs.settings import parse_named

Choice = str | float | Pattern | None
Allocation = str | Path | Allocator | Mapping[str, Choice] | Callable[[str], Choice]
"""How a pattern's zeros are shared out: "uniform", or an allocator or its name with settings ("owl:m=3"). Or
what each layer gets, whatever the pattern: a table from names with wildcards to patterns, the path of a JSON
file with one, or a rule from a layer's name to its pattern. None keeps a layer dense."""

UNIFORM: Literal["uniform"] = "uniform"
ALLOCATORS: dict[str, type[Any]] = {"owl": OWL, "sensitivity": Sensitivity}


def as_pattern(choice: str | float | Pattern, *, none: bool = False) -> Pattern:
    """A pattern as the API takes it, with `none` also "0%"; ValueError for what is none."""
    if none and share_of(str(choice)) == 0:
        return Unstructured(0.0)
    return choice if isinstance(choice, Pattern) else parse_pattern(str(choice))


def plan(
    allocation: Allocation, budget: Pattern, shapes: Mapping[str, tuple[int, int]], *, rounded: bool = False
) -> Patterns | Allocator:
    """Each layer's pattern, or if that takes a survey, the allocator to make it.

    Args:
        allocation: see `Allocation`. The first entry of a table that matches a layer counts; a layer that
            none matches stays dense.
        budget: the pattern that is shared out (of 1:m no layer can keep less, so that all get it). A table
            or a rule does not need it.
        shapes: names of the layers and their (out, in).
        rounded: whether what is left is rounded, so that a pattern may be without zeros.

    Raises:
        ValueError: an unknown allocation, a pattern that cannot be read or does not divide a layer's width,
            or an entry of a table that matches no layer.
    """
    if isinstance(allocation, str | Path):
        allocation = _read(str(allocation).strip())
    if isinstance(allocation, Mapping):
        rule = _table(allocation, list(shapes))
    elif callable(allocation):
        rule = allocation
    elif allocation != UNIFORM and not hasattr(allocation, "allocate"):
        raise ValueError(f"{allocation!r} is no allocation: give a name, a table, a rule or a .json file")
    else:

        def rule(name: str) -> Choice:
            return budget

    patterns = {name: _parse(rule(name), none=rounded) for name in shapes}
    for name, pattern in patterns.items():
        if pattern is not None:
            pattern.check_width(name, shapes[name][1])
    if not any(patterns.values()):
        raise ValueError("the allocation leaves every layer dense: there is nothing to prune")
    if allocation == UNIFORM or isinstance(allocation, Mapping) or callable(allocation):
        return patterns
    if not budget.sparsity:
        raise ValueError("0% leaves no zeros to share out: leave the allocation uniform")
    if isinstance(budget, NM) and budget.n == 1 and type(allocation) in ALLOCATORS.values():
        warnings.warn(f"{budget} leaves nothing to share out: every layer gets it", stacklevel=6)
        return patterns
    return allocation


def _read(text: str) -> Allocator | Mapping[str, Choice] | Literal["uniform"]:
    if text.startswith("{"):
        return as_object(text, "the allocation")
    if text.endswith(".json"):
        return read_json(Path(text))
    return UNIFORM if text.lower() == UNIFORM else parse_allocation(text)


def parse_allocation(text: str) -> Allocator:
    """Read an allocator with its settings: "owl", "owl:level=layer,m=5,lambda=0.08".

    Raises:
        ValueError: an unknown name or setting, or a value of the wrong type.
    """
    allocator: Allocator = parse_named(text, ALLOCATORS, f"allocation (beside {UNIFORM} and a .json file)")
    return allocator


def describe_allocation(planned: Patterns | Allocator, budget: Pattern) -> str | dict[str, Any]:
    """What `secateurs.json` says: "uniform", an allocator's name and settings, or each layer's pattern."""
    if not isinstance(planned, dict):
        name = next((name for name, kind in ALLOCATORS.items() if type(planned) is kind), None)
        return {"name": name or type(planned).__name__, **asdict(planned)}  # type: ignore[call-overload]
    if set(planned.values()) == {budget}:
        return UNIFORM
    return {name: str(pattern) for name, pattern in planned.items() if pattern is not None}


def _parse(choice: Choice, *, none: bool) -> Pattern | None:
    # Refuses what JSON may hold beside text and numbers.
    return None if choice is None else as_pattern(choice, none=none)


def _table(table: Mapping[str, Choice], layers: Sequence[str]) -> Callable[[str], Choice]:
    for glob in table:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise ValueError(f"'{glob}' in the table of patterns matches no layer; one is '{layers[0]}'")

    def rule(name: str) -> Choice:
        return next((pattern for glob, pattern in table.items() if fnmatchcase(name, glob)), None)

    return rule
