"""Solvers by name."""

from dataclasses import dataclass

import pytest

from secateurs import ADMM, Magnitude, SparseGPT, SparseLLM, Wanda
from secateurs.pruning.methods import METHODS, describe_method, parse_method


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("magnitude", Magnitude()),
        ("wanda", Wanda()),
        ("Wanda", Wanda()),
        ("sparsegpt", SparseGPT()),
        ("sparsegpt:", SparseGPT()),
        ("sparsegpt:block=64", SparseGPT(block=64)),
        ("sparsegpt:block=64,damping=0.02", SparseGPT(block=64, damping=0.02)),
        (" sparsegpt: damping = 2e-2, block=64 ", SparseGPT(block=64, damping=0.02)),
        ("admm:iterations=5,polish=0,ridge=1", ADMM(iterations=5, polish=0, ridge=1.0)),
        ("sparsellm:solver=wanda,iterations=2", SparseLLM(Wanda(), iterations=2)),
    ],
)
def test_methods_as_people_write_them(text: str, solver: object) -> None:
    assert parse_method(text) == solver


def test_settings_have_the_type_of_the_field() -> None:
    solver = parse_method("admm:iterations=5,ridge=1")
    assert isinstance(solver, ADMM)
    assert type(solver.iterations) is int
    assert type(solver.ridge) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq", r"unknown method 'gptq'; there are magnitude, wanda, sparsegpt, admm, sparsellm$"),
        ("", "unknown method ''"),
        ("sparsegpt:blok=64", r"'sparsegpt' has no setting 'blok'; it has: block, damping$"),
        ("wanda:block=64", r"'wanda' has no setting 'block'; it has: none$"),
        ("sparsegpt:block=x", r"'block=x' of 'sparsegpt': expected int$"),
        ("sparsegpt:block=1.5", "expected int"),
        ("sparsegpt:damping", "'damping=' of 'sparsegpt': expected float"),
        ("sparsegpt:block=0", "block is a number of columns, not 0"),
        ("sparsegpt:damping=nan", "damping must be above 0, not nan"),
        ("admm:iterations=1", "at least 3 iterations, not 1"),
        ("sparsellm:solver=gptq", "unknown method 'gptq'"),
        ("sparsellm:solver=sparsellm", "the solver inside SparseLLM is a local one"),
        ("sparsellm:solver=sparsegpt:block=64,damping=0.05", "a solver inside 'sparsellm' is a name alone"),
    ],
)
def test_what_is_no_method(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_the_record_of_a_method_makes_it_again(name: str) -> None:
    record = describe_method(METHODS[name]())
    assert record.pop("name") == name
    if "solver" in record:
        record["solver"] = record["solver"]["name"]
    settings = ",".join(f"{key}={value}" for key, value in record.items())
    assert parse_method(f"{name}:{settings}") == METHODS[name]()


def test_a_callers_own_solver_is_recorded_by_its_class() -> None:
    @dataclass(frozen=True)
    class Mine(Wanda):
        strength: int = 3

    assert describe_method(Mine()) == {"name": "Mine", "strength": 3}
