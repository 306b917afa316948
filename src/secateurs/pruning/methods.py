"""The solvers by name, for the command line and for the record of a run."""

from dataclasses import fields
from typing import Any

from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.solvers.admm import ADMM
from secateurs.pruning.solvers.magnitude import Magnitude
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.wanda import Wanda
from secateurs.settings import parse_named

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
    solver: Solver = parse_named(text, METHODS, "method", {Solver: parse_method})
    return solver


def describe_method(solver: Method) -> dict[str, Any]:
    """A solver's name and what is set of it, as recorded in `secateurs.json`."""
    name = next((name for name, kind in METHODS.items() if type(solver) is kind), type(solver).__name__)
    of_solver = {field.name: getattr(solver, field.name) for field in fields(solver)}  # type: ignore[arg-type]
    settings = {name: value for name, value in of_solver.items() if value is not None}
    if "solver" in settings:
        settings["solver"] = describe_method(settings["solver"])
    return {"name": name, **settings}
