"""Patterns for all layers: alike, by a rule or by a table; and those who survey, by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from families import tokens
from folders import save
from secateurs import NM, OWL, Pattern, Unstructured, prune
from secateurs.pruning.allocation.plan import as_pattern, describe_allocation, parse_allocation, plan
from secateurs.pruning.allocation.survey import Allocator, Patterns

LAYERS = {
    f"model.layers.{index}.{name}": (48, width)
    for index in range(12)
    for name, width in (("self_attn.q_proj", 48), ("mlp.up_proj", 48), ("mlp.down_proj", 90))
}


def planned(allocation: Any, pattern: Any = "50%") -> Patterns | Allocator:
    return plan(allocation, as_pattern(pattern), LAYERS)


@pytest.mark.parametrize("pattern", ["70%", "0.7", 0.7, Unstructured(0.7)])
def test_one_pattern_for_every_layer(pattern: Any) -> None:
    assert planned("uniform", pattern) == dict.fromkeys(LAYERS, Unstructured(0.7))


def test_the_first_entry_that_matches_counts_and_none_keeps_a_layer_dense() -> None:
    table = {"*.layers.1.*": None, "*.self_attn.*": "2:4", "*.layers.1?.mlp.*": 0.25, "*.up_proj": "80%"}
    patterns = planned(table)
    assert isinstance(patterns, dict)
    assert list(patterns) == list(LAYERS)
    for name, pattern in patterns.items():
        index = int(name.split(".")[2])
        if index == 1:
            assert pattern is None
        elif "self_attn" in name:
            assert pattern == NM(2, 4)
        elif index >= 10:
            assert pattern == Unstructured(0.25)
        else:
            assert pattern == (Unstructured(0.8) if "up_proj" in name else None)


def test_a_table_in_a_file_is_the_table(tmp_path: Path) -> None:
    table = {"*.self_attn.*": None, "*.mlp.*": "60%", "*": 0.5}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    assert planned(str(file)) == planned(file) == planned(table)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_one_of_every_m_cannot_be_shared_out(allocation: str) -> None:
    with pytest.warns(UserWarning, match="1:2 leaves nothing to share out"):
        assert planned(allocation, "1:2") == dict.fromkeys(LAYERS, NM(1, 2))


def test_the_warning_points_at_the_call(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    with pytest.warns(UserWarning, match="1:4 leaves nothing to share out") as caught:
        report = prune(
            source,
            output=tmp_path / "out",
            calibration=tokens(),
            method="wanda",
            pattern="1:4",
            allocation="owl",
        )
    assert caught[0].filename == __file__
    assert report.settings["allocation"] == "uniform"


def test_a_rule_is_asked_for_every_layer() -> None:
    def rule(name: str) -> str | None:
        return "2:4" if "q_proj" in name else None

    patterns = planned(rule)
    assert isinstance(patterns, dict)
    assert {name for name, pattern in patterns.items() if pattern == NM(2, 4)} == {
        name for name in LAYERS if name.endswith("q_proj")
    }
    assert sum(pattern is None for pattern in patterns.values()) == 24


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"*": "75"}, "outside"),
        ({"*": 75}, "outside"),
        ({"*": "0%"}, "outside"),
        ({"*": "100%"}, "outside"),
        ({"*": "4:2"}, "1 <= n < m"),
        ({"*": "half"}, "not a pattern"),
        ({"*.up_proj": True}, "'True' is not a pattern"),
        ({"*.up_proj": ["2:4"]}, "is not a pattern"),
        ({"*.up_proj": "50%", "*.gate_proj": "70%"}, r"'\*.gate_proj' in the table .* matches no layer"),
        ({}, "nothing to prune"),
        ({"*": None}, "nothing to prune"),
        (lambda name: None, "nothing to prune"),
        # 90 inputs do not divide by 4: the first such layer is named, and only where 2:4 is asked of it.
        ({"*": "2:4"}, r"^model.layers.0.mlp.down_proj has 90 inputs, which is not a multiple of 4"),
        ({"*.layers.3.*": "2:4"}, r"^model.layers.3.mlp.down_proj has 90 inputs"),
        ("missing.json", "'missing.json' is missing"),
        (0.7, "0.7 is no allocation"),
        ("70%", "unknown allocation .*uniform.* '70%'"),
        ("owl:depth=3", "'owl' has no setting 'depth'; it has: level, m, lambda$"),
    ],
)
def test_what_cannot_be_allocated(allocation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        planned(allocation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_the_budget_must_suit_every_layer(allocation: str) -> None:
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.down_proj has 90 inputs"):
        planned(allocation, "2:4")


def test_a_width_that_divides_is_accepted() -> None:
    patterns = planned({"*.down_proj": "3:6", "*": "2:4"})
    assert isinstance(patterns, dict)
    assert patterns["model.layers.0.mlp.down_proj"] == NM(3, 6)


@pytest.mark.parametrize(
    ("text", "allocator"),
    [
        ("owl", OWL()),
        ("OWL", OWL()),
        ("owl:level=layer,m=7,lambda=0.1", OWL(level="layer", m=7.0, lambda_=0.1)),
        (" owl: lambda = .05 ", OWL(lambda_=0.05)),
    ],
)
def test_allocators_as_people_write_them(text: str, allocator: Allocator) -> None:
    assert parse_allocation(text) == allocator
    assert planned(text) == allocator
    assert planned(allocator) == allocator


def test_what_the_record_says() -> None:
    budget: Pattern = Unstructured(0.5)
    assert describe_allocation(planned("uniform"), budget) == "uniform"
    assert describe_allocation(planned({"*": 0.5}), budget) == "uniform"
    table = describe_allocation(planned({"*.3.*.up_proj": "2:4", "*.4.*q_proj": "30%"}), budget)
    assert table == {"model.layers.3.mlp.up_proj": "2:4", "model.layers.4.self_attn.q_proj": "30%"}
    assert describe_allocation(OWL(), budget) == {"name": "owl", "level": "block", "m": 5.0, "lambda_": 0.08}
