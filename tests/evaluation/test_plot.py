"""Pictures of a record: they exist, they parse, and they show what the record says."""

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from families import tokens
from folders import save
from secateurs import Report, plot, prune
from secateurs.evaluation.plot import place


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    source = save(folder / "source", "llama")
    table = {"*.layers.1.*": None, "*": "60%"}
    return prune(source, output=folder / "out", calibration=tokens(), method="wanda", allocation=table).output


def iterated(pruned: Path, folder: Path, *, blocks: int = 3) -> Path:
    """A copy whose record tells of iterations on MLPs; the second iterate has no hidden term."""
    shutil.copytree(pruned, folder)
    record = json.loads((folder / "secateurs.json").read_text())
    record["mlps"] = [
        {
            "name": f"model.layers.{block}",
            "iterates": [
                {
                    "objective": 0.5 / i if i else None,
                    "terms": {"gate": 0.2 / i, "up": 0.2, "hidden": 0.1 * (i > 1), "output": 0.1}
                    if i
                    else {},
                    "held_out": 0.3 / (i + 1),
                }
                for i in range(4)
            ],
            "kept": 1,
        }
        for block in range(blocks)
    ]
    (folder / "secateurs.json").write_text(json.dumps(record))
    return folder


def assert_pictures(files: list[Path], words: dict[str, list[str]]) -> None:
    """PNG that Pillow reads, and SVG that parses and has the words, in comments beside their outlines."""
    assert sorted(file.name for file in files) == sorted(
        f"{name}.{kind}" for name in words for kind in ("png", "svg")
    )
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                image.verify()
                assert min(image.size) > 300
        else:
            text = file.read_text()
            assert ElementTree.fromstring(text).tag.endswith("svg")
            assert [word for word in words[file.stem] if f"<!-- {word} -->" not in text] == []


def test_a_record_without_iterations_gives_the_layers(pruned: Path, tmp_path: Path) -> None:
    files = plot(pruned, tmp_path / "new" / "pictures")
    words = [
        f"wanda, {Report.read(pruned).sparsity:.1%} zeros",
        "self_attn.q_proj",
        "mlp.down_proj",
        "share of zeros",
        "block",
    ]
    assert_pictures(files, {"layers": words})
    assert all(file.parent == tmp_path / "new" / "pictures" for file in files)


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_iterations_give_a_panel_for_each_block(blocks: int, pruned: Path, tmp_path: Path) -> None:
    folder = iterated(pruned, tmp_path / "out", blocks=blocks)
    files = plot(folder)
    assert {file.parent for file in files} == {folder / "plots"}
    panels = [f"model.layers.{block}" for block in range(blocks)]
    legend = ["objective", "gate", "up", "hidden", "output", "held-out error", "kept"]
    assert_pictures(files, {"layers": [], "convergence": [*panels, *legend, "iteration"]})


def test_the_descent_is_drawn_over_the_blocks(tmp_path: Path) -> None:
    """Also of a block whose weights stayed as they were."""
    source = save(tmp_path / "source", "llama")
    folder = prune(source, output=tmp_path / "out", calibration=tokens(batch=8), effort="fast").output
    record = json.loads((folder / "secateurs.json").read_text())
    record["refinements"][1]["after"] = None
    (folder / "secateurs.json").write_text(json.dumps(record))
    files = plot(folder)
    legend = ["before the descent", "after", "no better, and not taken"]
    assert_pictures(files, {"layers": [], "descent": [*legend, "block"]})


def test_repeated_it_gives_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    first = {file.name: file.read_bytes() for file in plot(pruned, tmp_path)}
    assert {file.name: file.read_bytes() for file in plot(pruned, tmp_path)} == first


def test_no_window_is_asked_for(pruned: Path, tmp_path: Path) -> None:
    plot(pruned, tmp_path)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no secateurs.json: only what `secateurs prune` wrote"), ("{", "not readable JSON")],
)
def test_folders_without_a_record(content: str | None, message: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "secateurs.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        plot(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_where_a_layer_is() -> None:
    assert place("model.layers.31.mlp.up_proj") == (31, "mlp.up_proj")
    assert place("transformer.h.0.attn.c_attn") == (0, "attn.c_attn")
    assert place("model.decoder.layers.3.fc1") == (3, "fc1")
    assert place("model.layers.3.mlp.experts.7.down_proj") == (3, "mlp.experts.*.down_proj")
