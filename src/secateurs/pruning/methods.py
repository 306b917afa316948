"""The solvers by name, for the command line and for the record of a run."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.solvers.admm import ADMM
from secateurs.pruning.solvers.magnitude import Magnitude
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.wanda import Wanda

Method = Solver | SparseLLM

METHODS: dict[str, type[Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "admm": ADMM,
    "sparsellm": SparseLLM,
}


def parse_method(text: str) -> Method:
    """Read a method with its settings: "admm", "sparsegpt:block=64,damping=0.02", "sparsellm:solver=admm".

    Raises:
        ValueError: an unknown method or setting, or a value of the wrong type.
    """
    solver: Solver = parse_named(text, METHODS, "method")
    return solver


def parse_named(text: str, kinds: Mapping[str, type[Any]], what: str) -> Any:
    """Read one of several dataclasses with its settings: "name" or "name:setting=value,...".

    Args:
        text: as people write it. A field that avoids a keyword of Python (`lambda_`) goes by the keyword.
        kinds: the dataclasses by name.
        what: they are, for the message.

    Raises:
        ValueError: an unknown name or setting, or a value of the wrong type.
    """
    name, _, settings = text.strip().partition(":")
    if name.lower() not in kinds:
        raise ValueError(f"unknown {what} '{name}'; there are {', '.join(kinds)}")
    kind = kinds[name.lower()]
    types = get_type_hints(kind)
    known = {field.name.rstrip("_"): field.name for field in fields(kind)}
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = map(str.strip, setting.partition("="))
        if key.rstrip("_") not in known:
            raise ValueError(f"'{name}' has no setting '{key}'; it has: {', '.join(known) or 'none'}")
        field = known[key.rstrip("_")]
        if types[field] is Solver:
            if ":" in value:  # at the next comma it would be unclear whose setting that is
                raise ValueError(
                    f"'{setting}': a solver inside '{name}' is a name alone here; use Python for its settings"
                )
            values[field] = parse_method(value)
            continue
        try:
            values[field] = types[field](value)
        except ValueError:
            raise ValueError(f"'{key}={value}' of '{name}': expected {types[field].__name__}") from None
    return kind(**values)


def describe_method(solver: Method) -> dict[str, Any]:
    """A solver's name and settings, as recorded in `secateurs.json`."""
    name = next((name for name, kind in METHODS.items() if type(solver) is kind), type(solver).__name__)
    settings = {field.name: getattr(solver, field.name) for field in fields(solver)}  # type: ignore[arg-type]
    if "solver" in settings:
        settings["solver"] = describe_method(settings["solver"])
    return {"name": name, **settings}
