"""Models that are to fit into so many bytes: what `compress` makes of them does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import decoders
import families
from folders import bytes_of, rewrite, save, tensors_of
from secateurs import Report, Statistics, compress, prune
from secateurs.checkpoint.scales import read_scales
from secateurs.demo import MODEL
from secateurs.pattern import Unstructured
from secateurs.pruning.allocation import fitting, room
from secateurs.pruning.allocation.forms import AS_STORED, Form
from secateurs.pruning.folder import WorkFolder
from secateurs.pruning.methods import parse_method
from secateurs.runtime.format import pack

TEXT = decoders.tokens(4, 24)


def least_and_most(model: Path) -> tuple[int, int]:
    """What a budget may be, as the refusals say it."""
    found = []
    for budget, where in ((1, r"can take, ([\d.]+) KB$"), (10**12, r"as it is \(([\d.]+) KB\)")):
        with pytest.raises(ValueError, match=where) as caught:
            prune(model, output=model.with_name("none"), calibration=TEXT, budget=budget)
        told = re.search(where, str(caught.value))
        assert told
        found.append(round(float(told[1]) * 1000))
    return found[0], found[1]


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_one_form_a_parameter(tmp_path: Path) -> None:
    """Scales, zeros and precision are those of the forms; what is as stored is untouched."""
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    least, most = least_and_most(source)
    budget = (least + most) // 2
    report = prune(source, output=tmp_path / "out", calibration=families.tokens(6), budget=budget)
    assert Report.read(tmp_path / "out") == report
    assert report.forms is not None
    forms = {f"{name}.weight": form for name, form in report.forms.forms.items()}
    assert len(set(forms.values())) > 1
    before, after, scales = tensors_of(source), tensors_of(tmp_path / "out"), read_scales(tmp_path / "out")
    assert {name: values for name, (values, _) in scales.items()} == {
        name: form.values for name, form in forms.items() if form.values
    }
    for name, form in forms.items():
        assert (after[name] == 0).float().mean() >= form.zeros - 0.01
        assert torch.equal(before[name], after[name]) == (form == AS_STORED)
    compress(tmp_path / "out", output=tmp_path / "small")
    assert 0.9 * budget < weight_bytes(tmp_path / "small") <= report.forms.bytes <= budget


@pytest.mark.parametrize(
    ("name", "method", "share"),
    [("gemma2", "sparsellm", 0.3), ("gpt2", "wanda", 0.0), ("mixtral", "sparsegpt", 0.0),
     ("gpt_oss", "sparsegpt", 0.3), ("dbrx", "wanda", 0.1), ("mamba", "sparsegpt", 0.2),
     ("longcat_flash", "sparsegpt", 0.0)],
)  # fmt: skip
def test_what_compress_gives_is_within_the_budget(
    name: str, method: str, share: float, tmp_path: Path
) -> None:
    """Tied weights, transposed ones, experts in one parameter, and matrices that cannot be packed."""
    source = decoders.save(name, tmp_path / "source", torch.bfloat16)
    least, most = least_and_most(source)
    budget = int(least + share * (most - least))
    report = prune(source, output=tmp_path / "out", calibration=TEXT, method=method, budget=budget, refine=0)
    done = compress(tmp_path / "out", output=tmp_path / "small")
    assert done.bytes_after == weight_bytes(tmp_path / "small") <= budget
    assert done.bytes_after > 0.9 * budget
    assert not done.moved
    assert report.forms is not None
    if share:
        assert report.forms.error <= (report.forms.uniform_error or report.forms.error)


def test_a_model_that_is_sparse_already(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    text = families.tokens(6)
    prune(source, output=tmp_path / "sparse", calibration=text, method="wanda", pattern="30%")
    least, most = least_and_most(tmp_path / "sparse")
    for share in (0.0, 0.3):
        out, budget = tmp_path / f"out{share}", int(least + share * (most - least))
        prune(tmp_path / "sparse", output=out, calibration=text, method="wanda", budget=budget)
        compress(out, output=tmp_path / f"small{share}")
        assert weight_bytes(tmp_path / f"small{share}") <= budget


def test_the_bundled_model_by_bytes_a_weight(tmp_path: Path) -> None:
    text = torch.randint(3, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    prune(MODEL, output=tmp_path / "out", calibration=text, method="wanda", bytes_per_weight=0.3)
    compress(tmp_path / "out", output=tmp_path / "small")
    report = Report.read(tmp_path / "out")
    shapes = tensors_of(MODEL)
    matrices = [f"{layer.name}.weight" for layer in report.layers]
    weights = sum(shapes[name].numel() for name in matrices)
    packed = tensors_of(tmp_path / "small")
    size = sum(packed[name].nbytes for name in matrices)
    assert 0.29 * weights < size <= 0.3 * weights


@pytest.mark.parametrize("block", [0, 1])
def test_a_run_that_was_cut_short_ends_with_the_same_bytes(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    least, most = least_and_most(source)

    def run(output: str) -> None:
        budget = (3 * least + most) // 4
        prune(source, output=tmp_path / output, calibration=families.tokens(4), method="wanda", budget=budget)

    run("whole")
    written = WorkFolder.write_block

    def cut(self: WorkFolder, index: int, *rest: Any) -> None:
        if index == block:
            raise KeyboardInterrupt
        written(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "write_block", cut)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    with monkeypatch.context() as patch:  # it is not measured again
        patch.delattr(fitting, "measured")
        run("out")
    whole, resumed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "out")
    for content in (whole, resumed):
        del content["secateurs.json"]  # it has seconds
    assert resumed == whole


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"budget": "60KB", "bytes_per_weight": 0.4}, "give one$"),
        ({"budget": "60KB", "pattern": "50%"}, "leave pattern out"),
        ({"bytes_per_weight": 0.4, "values": "int4"}, "bytes_per_weight chooses .* leave values out"),
        ({"budget": "60KB", "allocation": "owl"}, "leave the allocation uniform"),
        ({"budget": "60KB", "calibration": None, "method": "magnitude"}, "measured on calibration text"),
        ({"budget": "much"}, "'much' is no size"),
        ({"budget": "-5MB"}, "is no size"),
        ({"bytes_per_weight": 0.0}, "a number above 0, not 0.0"),
        ({"bytes_per_weight": float("nan")}, "a number above 0"),
        ({"bytes_per_weight": "0.4"}, "a number above 0, not 0.4"),
        ({"bytes_per_weight": True}, "a number above 0"),
        ({"budget": 1000.0}, r"of 1\.00 KB is below the least"),
        ({"budget": "10KB"}, r"of 10\.00 KB is below the least that this model can take, \d+\.\d\d KB$"),
        ({"bytes_per_weight": 0.1}, r"of 0\.1000 bytes a weight is below .* 0\.\d+ bytes a weight$"),
        (
            {"budget": "1GB"},
            r"of 1000\.00 MB holds the model as it is \(\d+\.\d\d KB\): there is nothing",
        ),
        ({"bytes_per_weight": 4}, r"holds the model as it is \(4\.0000 bytes a weight\)"),
    ],
)
def test_what_is_refused(chosen: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match=message) as caught:
        prune(source, output=tmp_path / "out", **{"calibration": families.tokens(2), **chosen})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_nothing_that_can_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source", "llama")
    monkeypatch.setattr(room, "apart", lambda pieces, experts: False)
    with pytest.raises(ValueError, match="is below the least that this model can take"):
        prune(source, output=tmp_path / "out", calibration=TEXT, budget="100KB")


@pytest.mark.parametrize(("name", "twice"), [("gemma2", False), ("smollm3", True), ("llama", False)])
def test_rounded_tables_leave_more_room(name: str, twice: bool, tmp_path: Path) -> None:
    """Also where one is stored as the embedding and as the head, of which compress drops the second."""
    source = decoders.save(name, tmp_path / "source", torch.bfloat16)
    budget = least_and_most(source)[0] - 1000
    if twice:
        tensors = tensors_of(source)
        rewrite(source, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    settings: dict[str, Any] = {"calibration": TEXT, "method": "sparsegpt", "budget": budget}
    with pytest.raises(ValueError, match="is below the least"):
        prune(source, output=tmp_path / "out", **settings)
    report = prune(source, output=tmp_path / "out", embedding="int8:group=32", **settings)
    done = compress(tmp_path / "out", output=tmp_path / "small")
    assert report.forms is not None
    assert 0.9 * budget < done.bytes_after <= report.forms.bytes <= budget


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("zeros", [0.3, 0.7])
def test_zeros_alone_are_bounded_too(method: str, zeros: float) -> None:
    """However a method rounds the number of zeros: in each row, in each block of columns, or over all."""
    weight, inputs = torch.randn(97, 203), torch.randn(300, 203)
    solver: Any = parse_method(method)
    pruned = solver.solve(weight, Statistics.from_inputs(inputs), Unstructured(zeros)).weight.bfloat16()
    assert pack(pruned)[1].bytes <= Form(zeros, None).bytes((97, 203), torch.bfloat16)
