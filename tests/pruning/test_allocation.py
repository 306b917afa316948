"""Patterns for all layers, by a rule or by a table."""

import json
from pathlib import Path
from typing import Any

import pytest

from secateurs import NM, Unstructured
from secateurs.pruning.allocation import allocate

LAYERS = {
    f"model.layers.{index}.{name}": width
    for index in range(12)
    for name, width in (("self_attn.q_proj", 48), ("mlp.up_proj", 48), ("mlp.down_proj", 90))
}


@pytest.mark.parametrize("pattern", ["70%", "0.7", 0.7, Unstructured(0.7)])
def test_one_pattern_for_every_layer(pattern: Any) -> None:
    assert allocate(pattern, LAYERS) == dict.fromkeys(LAYERS, Unstructured(0.7))


def test_the_first_entry_that_matches_counts_and_none_keeps_a_layer_dense() -> None:
    table = {"*.layers.1.*": None, "*.self_attn.*": "2:4", "*.layers.1?.mlp.*": 0.25, "*.up_proj": "80%"}
    patterns = allocate(table, LAYERS)
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
    assert allocate(str(file), LAYERS) == allocate(table, LAYERS)


def test_a_rule_is_asked_for_every_layer() -> None:
    def rule(name: str) -> str | None:
        return "2:4" if "q_proj" in name else None

    patterns = allocate(rule, LAYERS)
    assert {name for name, pattern in patterns.items() if pattern == NM(2, 4)} == {
        name for name in LAYERS if name.endswith("q_proj")
    }
    assert sum(pattern is None for pattern in patterns.values()) == 24


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("75", "outside"),
        (75, "outside"),
        ("0%", "outside"),
        ("100%", "outside"),
        ("4:2", "1 <= n < m"),
        ("half", "not a pattern"),
        ({"*.up_proj": True}, "'True' is not a pattern"),
        ({"*.up_proj": ["2:4"]}, "is not a pattern"),
        ({"*.up_proj": "50%", "*.gate_proj": "70%"}, r"'\*.gate_proj' in the table .* matches no layer"),
        ({}, "nothing to prune"),
        ({"*": None}, "nothing to prune"),
        (lambda name: None, "nothing to prune"),
        # 90 inputs do not divide by 4: the first such layer is named, and only where 2:4 is asked of it.
        ("2:4", r"^model.layers.0.mlp.down_proj has 90 inputs, which is not a multiple of 4"),
        ({"*.layers.3.*": "2:4"}, r"^model.layers.3.mlp.down_proj has 90 inputs"),
        ("missing.json", "'missing.json' is missing"),
    ],
)
def test_what_cannot_be_allocated(allocation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        allocate(allocation, LAYERS)
    assert "\n" not in str(caught.value)


def test_a_width_that_divides_is_accepted() -> None:
    assert allocate({"*.down_proj": "3:6", "*": "2:4"}, LAYERS)["model.layers.0.mlp.down_proj"] == NM(3, 6)
