"""The solvers by name, for the command line and for the record of a run."""

from dataclasses import fields
from typing import Any, get_type_hints

from secateurs.pruning.admm import ADMM
from secateurs.pruning.magnitude import Magnitude
from secateurs.pruning.solver import Solver
from secateurs.pruning.sparsegpt import SparseGPT
from secateurs.pruning.sparsellm import SparseLLM
from secateurs.pruning.wanda import Wanda

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
    name, _, settings = text.strip().partition(":")
    if name.lower() not in METHODS:
        raise ValueError(f"unknown method '{name}'; there are {', '.join(METHODS)}")
    solver = METHODS[name.lower()]
    types = get_type_hints(solver)
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = map(str.strip, setting.partition("="))
        if key not in {field.name for field in fields(solver)}:
            known = ", ".join(field.name for field in fields(solver)) or "none"
            raise ValueError(f"'{name}' has no setting '{key}'; it has: {known}")
        if types[key] is Solver:
            values[key] = parse_method(value)
            continue
        try:
            values[key] = types[key](value)
        except ValueError:
            raise ValueError(f"'{key}={value}' of '{name}': expected {types[key].__name__}") from None
    return solver(**values)


def describe_method(solver: Method) -> dict[str, Any]:
    """A solver's name and settings, as recorded in `secateurs.json`."""
    name = next((name for name, kind in METHODS.items() if type(solver) is kind), type(solver).__name__)
    settings = {field.name: getattr(solver, field.name) for field in fields(solver)}  # type: ignore[arg-type]
    if "solver" in settings:
        settings["solver"] = describe_method(settings["solver"])
    return {"name": name, **settings}
