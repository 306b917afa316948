"""Sweeps: what their cells hold, that they go on where they stopped, and that one failing stops no other."""

import csv
import importlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from characters import characters
from folders import everything_in, save
from secateurs import Checkpoint, compress, divergence, perplexity, prune, report, sweep
from secateurs.evaluation import load_model
from secateurs.evaluation.measured import Measured
from secateurs.report.grid import apart
from secateurs.report.sweep import rich_table
from secateurs.runtime.convert import compressed_bytes
from secateurs.text import calibration_blocks, evaluation_tokens

module = importlib.import_module("secateurs.report.sweep")  # secateurs.report is also the function

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(8))

GRID: dict[str, Any] = {"methods": ("wanda",), "patterns": ("2:4",), "length": 16}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save(tmp_path / "model", "llama", torch.bfloat16)
    characters().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(place: Path, **settings: Any) -> list[Measured]:
    told = {"text": (place / "text.txt",), "calibration": place / "text.txt", "samples": 4, **GRID}
    return sweep(place / "model", output=place / "out", **{**told, **settings})


class Stub:
    """Stands in for pruning and measuring where what is done when, and what stays, is the question."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pruned: list[str] = []
        self.fail: dict[str, BaseException] = {}
        """By cell: what pruning it, or with "speed" timing it, ends in."""
        self.losses: dict[str, float] = {}
        patch.setattr(module, "prune", self.prune)
        patch.setattr(module, "load_model", lambda folder, device: folder.name)
        patch.setattr(module, "compressed_bytes", lambda folder: 1000)
        patch.setattr(module, "perplexity", lambda model, tokens, **_: 10.0)
        patch.setattr(module, "divergence", lambda dense, model, *_, **__: self.losses.get(model, 1.0))
        patch.setattr(module, "compress", self.compress)
        patch.setattr(module, "report", lambda folders, **_: None)

    def prune(self, model: Path, settings: Any, **_: Any) -> Any:
        name = settings.output.name
        assert not settings.output.exists()
        if name in self.fail:
            raise self.fail.pop(name)
        self.pruned.append(name)
        shutil.copytree(model, settings.output)
        (settings.output / "secateurs.json").write_text('{"measured": []}')
        return SimpleNamespace(output=settings.output, sparsity=0.5, seconds=1.0)

    def compress(self, folder: Path, packed: Path) -> None:
        raise RuntimeError("no such instruction")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch)


def models(place: Path) -> set[str]:
    return {file.parent.name for file in (place / "out").rglob("model.safetensors")}


@pytest.mark.parametrize("keep", ["none", "all"])
def test_cells_hold_what_pruning_and_measuring_by_hand_give(place: Path, keep: str) -> None:
    rows = run(place, keep=keep)
    assert [row.name for row in rows] == ["dense", "wanda 2:4"]
    tokenizer = characters()
    tokens = evaluation_tokens(place / "text.txt", tokenizer)
    dense = load_model(place / "model", "cpu")
    on = str(place / "text.txt")
    if keep == "all":
        kept = load_model(place / "out" / "cells" / "wanda-2of4", "cpu")
        assert rows[1].figures[on]["perplexity"] == perplexity(kept, tokens, length=16)
        return
    ids = calibration_blocks(place / "text.txt", tokenizer, samples=4, length=16)
    pruned = prune(place / "model", output=place / "by-hand", calibration=ids, method="wanda", pattern="2:4")
    model = load_model(pruned.output, "cpu")
    compress(pruned.output, place / "packed")
    assert rows[0].figures == {on: {"perplexity": perplexity(dense, tokens, length=16)}}
    assert rows[1].figures == {
        on: {
            "perplexity": perplexity(model, tokens, length=16),
            "divergence": divergence(dense, model, tokens, length=16, windows=16),
        }
    }
    assert rows[1].sparsity == pruned.sparsity
    assert rows[1].bytes == Checkpoint(place / "packed").tensor_bytes
    assert rows[0].bytes == Checkpoint(place / "model").tensor_bytes
    assert json.loads((place / "out" / "table.json").read_text())[1]["bytes"] == rows[1].bytes
    with open(place / "out" / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == ["dense", "wanda 2:4"]
    assert float(lines[1]["zeros"]) == rows[1].sparsity
    assert float(lines[1]["text perplexity"]) == rows[1].figures[on]["perplexity"]
    marked = (place / "out" / "table.md").read_text().splitlines()
    assert len(marked) == 2 + len(rows)
    assert all(line.count("|") == marked[0].count("|") for line in marked)
    page = (place / "out" / "report.html").read_text()
    assert "wanda 2:4" in page
    assert 'id="layers"' in page, "from the records that stay"
    assert models(place) == set()


GRID_OF_4 = {"methods": ("wanda", "magnitude"), "patterns": ("50%,2:4",)}


def test_it_goes_on_where_it_stopped(place: Path, stub: Stub) -> None:
    stub.fail = {"wanda-2of4": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(place, **GRID_OF_4)
    assert stub.pruned == ["wanda-50", "magnitude-50"]
    rows = run(place, **GRID_OF_4)
    assert stub.pruned == ["wanda-50", "magnitude-50", "wanda-2of4", "magnitude-2of4"]
    assert run(place, **GRID_OF_4) == rows
    more = run(place, methods=("wanda", "magnitude"), patterns=("50%", "2:4", "60%"))
    assert stub.pruned[4:] == ["wanda-60", "magnitude-60"]
    assert more[: len(rows)] == rows
    (place / "out" / "cells" / "wanda-60.json").unlink()
    assert run(place, patterns=("60%",))[1].error is None, "the record that stayed is in nobody's way"
    assert stub.pruned[6:] == ["wanda-60"]


@pytest.mark.parametrize("changed", ["samples", "text", "model", "spelling"])
def test_what_figures_depend_on_may_not_change(place: Path, stub: Stub, changed: str) -> None:
    shutil.copy(place / "text.txt", place / "calibration.txt")
    told: dict[str, Any] = {"calibration": place / "calibration.txt", "patterns": ("0.5",)}
    run(place, **told)
    said = "begun with other settings"
    if changed == "samples":
        told["samples"] = 5
    elif changed == "text":
        (place / "text.txt").write_text(TEXT + "More. ")
    elif changed == "model":
        config = place / "model" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    else:
        told["patterns"], said = ("0.5%",), "is of 'wanda 0.5', not of 'wanda 0.5%'"
    before = everything_in(place)
    with pytest.raises(ValueError, match=said):
        run(place, **told)
    assert everything_in(place) == before


def test_a_cell_that_fails_is_a_row_that_says_why(place: Path, stub: Stub) -> None:
    stub.fail = {"wanda-50": RuntimeError("the inputs\nare <not> [/finite]")}
    rows = run(place, **GRID_OF_4)
    assert [row.error for row in rows] == [None, "the inputs are <not> [/finite]", None, None, None]
    page = report([place / "out"], output=place / "page.html").read_text()
    assert "the inputs are &lt;not&gt; [/finite]" in page
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rich_table(rows))
    assert "the inputs are <not> [/finite]" in console.export_text()
    assert [row.error for row in run(place, **GRID_OF_4)] == [None] * 5, "what failed is tried again"


def test_speed_that_cannot_be_measured_costs_no_other_figure(place: Path, stub: Stub) -> None:
    rows = run(place, speed=True)
    assert [row.error for row in rows] == ["speed: no such instruction"] * 2
    assert all(row.figures and row.bytes for row in rows)
    assert models(place) == set()


def test_models_that_are_to_stay_do_also_when_that_is_asked_later(place: Path, stub: Stub) -> None:
    stub.losses = {"magnitude-50": 0.5, "wanda-2of4": 0.25}
    run(place, **GRID_OF_4)
    assert models(place) == set()
    run(place, **GRID_OF_4, keep="best")
    assert models(place) == {"magnitude-50", "wanda-2of4"}
    assert stub.pruned[4:] == ["magnitude-50", "wanda-2of4"]
    run(place, **GRID_OF_4, keep="all")
    assert models(place) == {"wanda-50", "magnitude-50", "wanda-2of4", "magnitude-2of4"}
    run(place, **GRID_OF_4, keep="best")
    assert models(place) == {"magnitude-50", "wanda-2of4"}
    assert len(stub.pruned) == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": ("wand",)}, "wand"),
        ({"patterns": ("5:4",)}, "5:4"),
        ({"values": ("int5",)}, "int5"),
        ({"text": ()}, "nothing to measure"),
        ({"patterns": ("0%",)}, "nothing to sweep"),
        ({"patterns": ("0.5", "0.5%")}, "have one name"),
        ({"keep": "best", "text": (), "tasks": ("piqa",)}, "keep best needs a text"),
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
