"""The page about output folders: what is in it, what is not, and that nothing in it is taken for HTML."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from secateurs import report
from secateurs.evaluation.inspect import Weights
from secateurs.evaluation.measured import Measured, write_measured
from secateurs.recovery.report import KEY as RECOVERY
from secateurs.report.charts import Axis, Point, Series, percent, xy
from secateurs.report.figures import Part
from secateurs.report.layers import heat_map
from secateurs.report.sources import read_sources, with_names
from secateurs.report.texts import differences
from secateurs.report.weights import agreement, zeros_by_size
from secateurs.report.weights import weights as section_of_weights


class Page(HTMLParser):
    """Sections by id, all text, tags in use."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.sections: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        told = dict(attrs)
        if tag == "section" and told.get("id"):
            self.sections.append(str(told["id"]))
        self.addresses += [str(told[name]) for name in ("src", "href", "action") if told.get(name)]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_each_record_has_its_sections_and_what_is_not_recorded_has_none(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    expected = {
        "magnitude": ["layers", "weights", "settings"],
        "sparsellm": ["layers", "convergence", "weights", "settings"],
        "trained": ["training", "settings"],
        "measured": ["quality", "settings"],
        "profile": ["activity"],
    }
    for name, sections in expected.items():
        page = Page(report([outputs[name]], output=tmp_path / "deep" / f"{name}.html"))
        assert page.sections == ["summary", *sections], name
        assert all(address.startswith(("#", "data:")) for address in page.addresses)
        assert not re.search(r"@import|url\(", page.source)
        assert len(page.source) < 5_000_000
    assert (
        "masks" in Page(report([outputs["magnitude"], outputs["wanda"]], output=tmp_path / "a.html")).sections
    )


def test_what_comes_from_files_and_prompts_is_no_html(outputs: dict[str, Path], tmp_path: Path) -> None:
    folders = [outputs[name] for name in ("sparsellm", "measured", "trained")]
    plain = Page(report([outputs["wanda"]], output=tmp_path / "plain.html", prompt=("ab",), tokens=2))
    page = Page(report(folders, output=tmp_path / "page.html", prompt=("<script>ab</script>",), tokens=2))
    assert "What they say" in page.text
    assert not {"b", "i"} & page.tags
    assert page.source.count("<script") == plain.source.count("<script") == 1
    assert {"x<b>&\"'", "it <i>failed</i>", "<script>ab</script>"} <= {word.strip() for word in page.words}


def test_figures_are_those_of_the_records(outputs: dict[str, Path], tmp_path: Path) -> None:
    text = Page(report([outputs["measured"], outputs["trained"]], output=tmp_path / "page.html")).text
    assert "4 pruned models measured; nearest to the dense one on novel is admm 50%, perplexity 33.3" in text
    assert "wanda 2:4 5.0 40 0.5" in text
    assert "Trained for 4 steps, 400 tokens, in 2 seconds, with 80% of the FLOPs" in text
    assert "the validation loss is 2.750" in text
    assert "3 300 3.2500" in text, "step, tokens, loss"
    assert "2 1 3.5000 1.38" in text, "step, seconds, loss, and the seconds times the speed-up"
    assert "1 heads 75%" in text, "half of them in two steps of four, and all in the others"


def test_older_records_have_losses_by_steps_and_no_more(outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(outputs["trained"], folder)
    record = json.loads((folder / "secateurs.json").read_text())
    record["history"] = [
        {name: entry[name] for name in ("step", "loss", "omission_rate")} for entry in record["history"]
    ]
    (folder / "secateurs.json").write_text(json.dumps(record))
    text = Page(report([folder], output=tmp_path / "page.html")).text
    assert "2 3.5000" in text
    assert not any(said in text for said in ("Loss against", "estimate", "Speed-up", "mean over the steps"))


@pytest.mark.parametrize(
    ("folder", "said"), [("nowhere", "no folder at"), ("source", "holds no record"), ("empty", "no record")]
)
def test_folders_without_a_record_are_one_line(
    outputs: dict[str, Path], tmp_path: Path, folder: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    place = outputs.get(folder, tmp_path / folder)
    with pytest.raises(ValueError, match=said) as caught:
        report([outputs["wanda"], place], output=tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="nothing to report on"):
        report([], output=tmp_path / "page.html")


def test_a_file_that_is_no_page_is_not_replaced(outputs: dict[str, Path], tmp_path: Path) -> None:
    page = report([outputs["measured"]], output=tmp_path / "page.html")
    assert report([outputs["measured"]], output=page) == page
    config = tmp_path / "config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match="is no page of a report"):
        report([outputs["measured"]], output=config)
    assert config.read_text() == "{}"


@pytest.mark.parametrize(("prompt", "said"), [("", "a prompt is empty"), ("abc", "no folder holds a model")])
def test_prompts_that_nothing_can_go_on_with_are_one_line(
    outputs: dict[str, Path], tmp_path: Path, prompt: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        report([outputs["measured"]], output=tmp_path / "page.html", prompt=(prompt,))


def test_a_folder_called_dense_is_not_taken_for_the_dense_model(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    pruned = shutil.copytree(outputs["wanda"], tmp_path / "dense")
    page = report([pruned], output=tmp_path / "page.html", prompt=("ab",), tokens=2).read_text()
    columns = page.partition('<div class="columns">')[2]
    assert columns.index(f"<h4>{outputs['source']}</h4>") < columns.index("<h4>dense</h4>")


def test_figures_measured_otherwise_are_not_in_one_chart(outputs: dict[str, Path], tmp_path: Path) -> None:
    for name, length in (("a", 512), ("b", 1024), ("c", 1024)):
        (tmp_path / name).mkdir()
        row = Measured(str(outputs["wanda"]), 1000 * length, {"novel.txt": {"perplexity": 20.0}})
        write_measured(tmp_path / name, [row], {"settings": {"length": length}})
    text = Page(report([tmp_path / name for name in "abc"], output=tmp_path / "page.html")).text
    assert "Perplexity on novel, length 1024" in text
    assert "novel, length 512 perplexity" in text, "in the table"
    alike = Page(report([tmp_path / name for name in "bc"], output=tmp_path / "alike.html")).text
    assert "length 1024 perplexity" not in alike


def test_a_recovered_model_is_told_from_the_pruned_one(outputs: dict[str, Path], tmp_path: Path) -> None:
    recovered = shutil.copytree(outputs["wanda"], tmp_path / "recovered")
    record = json.loads((recovered / "secateurs.json").read_text())
    told = {"settings": {}, "versions": {}, "seconds": 1.0, "steps": 1, "tokens": 10, "peak_memory_bytes": 1,
            "zeros": 10, "before": 2.0, "after": 1.0}  # fmt: skip
    (recovered / "secateurs.json").write_text(json.dumps({**record, RECOVERY: told}))
    rows = [Measured(str(folder), 1000) for folder in (outputs["wanda"], recovered)]
    named = with_names(rows, read_sources([outputs["wanda"], recovered]))
    assert [row.method for row in named] == ["wanda", "wanda, recovered"]


def test_shares_that_hardly_differ_have_hardly_other_shades() -> None:
    values = [(f"model.layers.{i}.mlp.up_proj", 0.5 + i / 1000, 10.0) for i in range(2)]
    [(_, (one, other))] = heat_map("Share of zeros", values, percent, least=0.01).rows
    assert one is not None
    assert other is not None
    assert other.shade - one.shade == pytest.approx(0.1)


def test_zeros_by_size_and_agreement_count() -> None:
    dense = torch.arange(1.0, 41.0).view(4, 10) * torch.tensor([1.0, -1.0]).repeat(5)
    pruned = torch.where(dense.abs() <= 10, 0.0, dense)
    assert zeros_by_size(pruned, dense) == (1, 1, 0.5, 0, 0, 0, 0, 0, 0, 0)
    other = torch.where((dense.abs() > 5) & (dense.abs() <= 15), 0.0, dense)
    assert agreement(pruned, other) == 5 / 15
    assert agreement(pruned, pruned) == 1
    assert agreement(dense, dense) == 1


def test_of_large_matrices_evenly_spaced_rows_are_looked_at(
    outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(outputs["wanda"])
    name, (rows, columns) = next(iter(weights.shapes.items()))
    whole, some = weights.read(name), weights.read(name, 5 * columns + 1)
    assert torch.equal(some, whole[torch.linspace(0, rows - 1, 5).round().long()])
    assert torch.equal(weights.read(name, rows * columns), whole)
    assert len(weights.read(name, 1)) == 1
    # Wanda leaves every row of a matrix the same number of zeros, so that a few tell of all.
    sources = read_sources([outputs["wanda"]])
    [group] = section_of_weights(sources, None).groups
    monkeypatch.setattr(sys.modules[section_of_weights.__module__], "MOST", 500)
    [sampled] = section_of_weights(sources, None).groups
    assert [figure.title for figure in sampled.figures] == [figure.title for figure in group.figures]
    assert any("zeros" in figure.title for figure in group.figures[1:])


def test_differences_make_up_the_text() -> None:
    text, reference = "the cat  sat on\na mat.", "the dog sat on a mat."
    parts = differences(text, reference)
    assert "".join(part.text for part in parts) == text
    assert next(part.text for part in parts if part.marked) == "cat  sat"
    assert differences(text, text) == [Part(text)]
    assert differences("", reference) == []


def test_points_are_where_their_values_are() -> None:
    """On a logarithmic axis equal ratios are equal lengths; what cannot be drawn is left out."""
    points = [Point(x, y, f"{x}") for x, y in ((1, 1.0), (2, 10.0), (3, 100.0), (4, 0.0), (5, float("nan")))]
    svg = xy([Series("a", points, 0)], Axis("x"), Axis("y", log=True), about="<about>")
    (path,) = re.findall(r'class="line s0" d="([^"]*)"', svg)
    places = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    assert len(places) == 3
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert steps[0][0] > 0 > steps[0][1]
    assert "&lt;about&gt;" in svg
