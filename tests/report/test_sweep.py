"""Sweeps: what their cells hold, that they go on where they stopped, and that one failing stops no other."""

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from characters import characters
from folders import everything_in, save
from secateurs import Checkpoint, compress, divergence, perplexity, prune, sweep
from secateurs.evaluation import load_model
from secateurs.evaluation.measured import Measured
from secateurs.report.sweep import apart
from secateurs.runtime.convert import compressed_bytes
from secateurs.text import calibration_blocks, evaluation_tokens

module = importlib.import_module("secateurs.report.sweep")  # secateurs.report is also the function

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(8))

GRID: dict[str, Any] = {"methods": ("wanda", "magnitude"), "patterns": ("50%,2:4",), "length": 16}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save(tmp_path / "model", "llama", torch.bfloat16)
    characters().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(place: Path, **settings: Any) -> list[Measured]:
    told = {"text": (place / "text.txt",), "calibration": place / "text.txt", "samples": 4, **GRID}
    return sweep(place / "model", output=place / "out", **{**told, **settings})


def test_cells_hold_what_pruning_and_measuring_by_hand_give(place: Path) -> None:
    rows = run(place)
    assert [row.name for row in rows] == [
        "dense", "wanda 50%", "magnitude 50%", "wanda 2:4", "magnitude 2:4"
    ]  # fmt: skip
    tokenizer = characters()
    tokens = evaluation_tokens(place / "text.txt", tokenizer)
    ids = calibration_blocks(place / "text.txt", tokenizer, samples=4, length=16)
    pruned = prune(place / "model", output=place / "by-hand", calibration=ids, method="wanda", pattern="2:4")
    dense, model = load_model(place / "model", "cpu"), load_model(pruned.output, "cpu")
    compress(pruned.output, place / "packed")
    on = str(place / "text.txt")
    assert rows[0].figures == {on: {"perplexity": perplexity(dense, tokens, length=16)}}
    assert rows[3].figures == {
        on: {
            "perplexity": perplexity(model, tokens, length=16),
            "divergence": divergence(dense, model, tokens, length=16, windows=16),
        }
    }
    assert rows[3].sparsity == pruned.sparsity
    assert rows[3].bytes == Checkpoint(place / "packed").tensor_bytes
    assert rows[0].bytes == Checkpoint(place / "model").tensor_bytes
    assert json.loads((place / "out" / "table.json").read_text())[3]["bytes"] == rows[3].bytes
    with open(place / "out" / "table.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert [line[0] for line in lines] == ["model", *(row.name for row in rows)]
    marked = (place / "out" / "table.md").read_text().splitlines()
    assert len(marked) == 2 + len(rows)
    assert all(line.count("|") == marked[0].count("|") for line in marked)
    page = (place / "out" / "report.html").read_text()
    assert "wanda 2:4" in page
    assert 'id="layers"' in page, "from the records that stay"
    assert not list((place / "out").rglob("*.safetensors"))


def test_it_goes_on_where_it_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[str] = []

    def counted(model: Path, settings: Any, **more: Any) -> Any:
        if len(pruned) == 2 and "killed" not in pruned:
            pruned.append("killed")
            raise KeyboardInterrupt
        pruned.append(settings.output.name)
        return prune(model, settings, **more)

    monkeypatch.setattr(module, "prune", counted)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    rows = run(place)
    assert pruned == ["wanda-50", "magnitude-50", "killed", "wanda-2of4", "magnitude-2of4"]
    assert run(place) == rows
    more = run(place, patterns=("50%", "2:4", "60%"))
    assert pruned[5:] == ["wanda-60", "magnitude-60"]
    assert more[: len(rows)] == rows
    before = everything_in(place)
    with pytest.raises(ValueError, match="begun with other settings"):
        run(place, samples=5)
    assert everything_in(place) == before


def test_a_cell_that_fails_is_a_row_that_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Path, settings: Any, **more: Any) -> Any:
        if settings.pattern == "50%" and settings.method == "wanda":
            raise FloatingPointError("the inputs\nare <not> finite")
        return prune(model, settings, **more)

    monkeypatch.setattr(module, "prune", failing)
    rows = run(place)
    assert [row.error for row in rows] == [None, "the inputs are <not> finite", None, None, None]
    assert "the inputs are &lt;not&gt; finite" in (place / "out" / "report.html").read_text()
    monkeypatch.undo()
    assert [row.error for row in run(place)] == [None] * 5, "what failed is tried again"


@pytest.mark.parametrize("keep", ["best", "all"])
def test_models_that_are_kept_load_as_they_were_measured(place: Path, keep: str) -> None:
    values = ("none", "int8") if keep == "best" else ("none",)
    rows = run(place, keep=keep, patterns=("50%",), values=values)
    kept = {file.parent.name for file in (place / "out").rglob("model.safetensors")}
    names = {row.name: row.name.replace(" ", "-").replace("%", "") for row in rows[1:]}
    on = str(place / "text.txt")
    if keep == "all":
        assert kept == set(names.values())
    else:
        best = {
            min(some, key=lambda row: row.figures[on]["divergence"]).name
            for some in ([row for row in rows[1:] if row.values == values] for values in (None, "int8"))
        }
        assert kept == {names[name] for name in best}
    for row in rows[1:]:
        if names[row.name] in kept:
            model = load_model(place / "out" / "cells" / names[row.name], "cpu")
            tokens = evaluation_tokens(place / "text.txt", characters())
            assert perplexity(model, tokens, length=16) == row.figures[on]["perplexity"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ("wand",)}, "wand"),
        ({"patterns": ("5:4",)}, "5:4"),
        ({"values": ("int5",)}, "int5"),
        ({"text": ()}, "nothing to measure"),
        ({"patterns": ("0%",)}, "nothing to sweep"),
        ({"keep": "some"}, "keep is none, best or all"),
        ({"calibration": None}, "calibration text is needed"),
        ({"length": 5000}, "5000"),
    ],
)
def test_mistakes_in_any_cell_are_found_before_the_work(
    place: Path, settings: dict[str, Any], said: str
) -> None:
    before = everything_in(place)
    with pytest.raises(ValueError, match=said) as caught:
        run(place, **settings)
    assert "\n" not in str(caught.value)
    assert everything_in(place) == before


def test_items_are_told_apart_by_commas_that_belong_to_none() -> None:
    assert apart(["sparsellm:solver=admm,iterations=2,wanda", "admm"]) == [
        "sparsellm:solver=admm,iterations=2", "wanda", "admm"
    ]  # fmt: skip
    assert apart("50%,2:4, 70%") == ["50%", "2:4", "70%"]
    assert apart(["int4:group=128,grid=half", "none"]) == ["int4:group=128,grid=half", "none"]


def test_compressed_bytes_of_what_is_compressed_are_its_own(place: Path) -> None:
    pruned = prune(place / "model", output=place / "pruned", method="magnitude", pattern="80%")
    compress(pruned.output, place / "packed")
    packed = Checkpoint(place / "packed").tensor_bytes
    assert compressed_bytes(pruned.output) == compressed_bytes(place / "packed") == packed
    assert packed < Checkpoint(pruned.output).tensor_bytes
