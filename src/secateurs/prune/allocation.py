"""How much sparsity each layer gets: one pattern for all, a rule, or a table."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from secateurs.checkpoint import read_json
from secateurs.pattern import Pattern, parse_pattern

Choice = str | float | Pattern | None
Allocation = str | float | Pattern | Mapping[str, Choice] | Callable[[str], Choice]
"""A pattern ("70%", 0.7, "2:4") for every layer; a table from names with wildcards to patterns; a rule from a
layer's name to its pattern; or the path of a JSON file that holds a table. None keeps a layer dense."""


def allocate(allocation: Allocation, layers: Mapping[str, int]) -> dict[str, Pattern | None]:
    """Give each layer its pattern.

    Args:
        allocation: see `Allocation`. The first entry of a table that matches a layer counts; a layer that
            none matches stays dense.
        layers: names of the layers and how many inputs each has.

    Raises:
        ValueError: a pattern that cannot be read, does not divide a layer's width, or an entry of a table
            that matches no layer.
    """
    if isinstance(allocation, str) and allocation.endswith(".json"):
        allocation = read_json(Path(allocation))
    if isinstance(allocation, Mapping):
        rule = _table(allocation, list(layers))
    elif callable(allocation):
        rule = allocation
    else:
        one = _parse(allocation)

        def rule(name: str) -> Choice:
            return one

    patterns = {name: _parse(rule(name)) for name in layers}
    for name, pattern in patterns.items():
        if pattern is not None:
            pattern.check_width(name, layers[name])
    if not any(patterns.values()):
        raise ValueError("the pattern leaves every layer dense: there is nothing to prune")
    return patterns


def _parse(choice: Choice) -> Pattern | None:
    if choice is None or isinstance(choice, Pattern):
        return choice
    return parse_pattern(str(choice))  # refuses what JSON may hold beside text and numbers


def _table(table: Mapping[str, Choice], layers: Sequence[str]) -> Callable[[str], Choice]:
    for glob in table:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise ValueError(f"'{glob}' in the table of patterns matches no layer; one is '{layers[0]}'")

    def rule(name: str) -> Choice:
        return next((pattern for glob, pattern in table.items() if fnmatchcase(name, glob)), None)

    return rule
