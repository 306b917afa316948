"""Rounded models as files: what transformers loads lies on the grids whose scales lie beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_walk import linear_names, prune_in_memory
from torch import Tensor
from transformers import AutoModelForCausalLM

import decoders
import families
from folders import bytes_of, save, tensors_of
from secateurs import Report, Solution, Statistics, prune, recover
from secateurs.checkpoint.scales import read_scales
from secateurs.pattern import Mask, Pattern
from secateurs.pruning.folder import WorkFolder
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.values import SCALES, Values


def on_grid(name: str, parameter: Tensor, values: Values, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter's matrices, (..., out, in), and what their nearest levels are in its dtype, with its
    zeros; only of rows that have a scale."""
    if parameter.ndim == 2 and scales.ndim == 3:
        parameter = parameter.unflatten(0, (len(scales), -1))
    if parameter.shape[-2] != scales.shape[-2] or "c_" in name:
        parameter = parameter.mT
    assert scales.shape[-1] == values.groups(parameter.shape[-1])
    assert scales.shape[:-1] == parameter.shape[:-1]
    rounded = scales.any(-1)
    nearest = values.decode(values.encode(parameter, scales), scales).to(parameter.dtype)
    return parameter[rounded], (nearest * (parameter != 0))[rounded]


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", torch.bfloat16, {"method": "sparsellm", "pattern": "0%", "values": "int4:group=32"}),
    ("llama-bias", torch.float32, {"method": "sparsellm", "pattern": "50%", "values": "int3:group=32"}),
    ("llama", torch.float16, {"method": "wanda", "pattern": "2:4", "values": "int2:group=32"}),
    ("gpt2", torch.bfloat16, {"method": "sparsegpt", "pattern": "50%", "values": Values(4, 32, "half")}),
    ("phi3", torch.bfloat16, {"method": "admm", "pattern": "60%", "values": "int8"}),
    ("opt", torch.bfloat16, {"method": "sparsegpt", "target": "dense", "pattern": "50%", "values": "int4"}),
    ("gemma2", torch.bfloat16, {"method": "magnitude", "pattern": "30%", "values": "int4"}),
]


@pytest.mark.parametrize(("name", "dtype", "chosen"), CASES, ids=lambda case: str(case))
def test_what_is_loaded_lies_on_the_grids(
    name: str, dtype: torch.dtype, chosen: dict[str, Any], tmp_path: Path
) -> None:
    source = save(tmp_path / "source", name, dtype)
    report = prune(source, output=tmp_path / "out", calibration=families.tokens(4), **chosen)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    scales = read_scales(tmp_path / "out")
    assert sorted(scales) == sorted(linear_names(source))
    sparsity = {f"{layer.name}.weight": layer.sparsity for layer in report.layers}
    for parameter, (values, scale) in scales.items():
        stored, nearest = on_grid(parameter, model.get_parameter(parameter).detach(), values, scale)
        assert torch.equal(stored, nearest), parameter
        zeros = float((model.get_parameter(parameter) == 0).float().mean())
        assert zeros == pytest.approx(sparsity[parameter])
        if values.grid == "half":  # no level is 0
            asked = {"50%": 0.5, "2:4": 0.5}[report.settings["pattern"]]
            assert zeros == pytest.approx(asked, abs=0.01)
    assert all(layer.rounding and layer.rounding > 0 for layer in report.layers)
    assert Report.read(tmp_path / "out") == report
    assert report.values == values


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm", None])
def test_experts(name: str, method: str | None, tmp_path: Path) -> None:
    """One of them is left as it is, and so are its rows' scales."""
    source = decoders.save(name, tmp_path / "source")
    text: dict[str, Any] = {"calibration": decoders.tokens(6, 24), "method": method, "refine": 0}
    if method is None:
        text = {"method": "magnitude"}
    layers = [layer.name for layer in prune(source, output=tmp_path / "all", method="magnitude").layers]
    table = {layer: "50%" for layer in layers if ".1." not in layer.removeprefix("model.layers.1.")}
    prune(source, output=tmp_path / "out", allocation=table, values="int4:group=32", **text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    found = read_scales(tmp_path / "out")
    parts = 0
    for parameter, (values, scales) in found.items():
        before, after = dense.get_parameter(parameter), model.get_parameter(parameter)
        stored, nearest = on_grid(parameter, after.detach(), values, scales)
        assert torch.equal(stored, nearest), parameter
        if scales.ndim == 3:
            parts += 1
            assert not scales[1].any()
            assert scales[0].any()
            experts = [tensor.reshape(len(scales), -1) for tensor in (before, after)]
            assert torch.equal(experts[0][1], experts[1][1])
            assert not torch.equal(experts[0][0], experts[1][0])
    assert parts


@dataclass(frozen=True)
class RoundAll:
    """Rounding as a solver for a whole model in memory."""

    values: Values

    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        return Rounding(self.values).solve(weight, statistics, Mask(torch.ones_like(weight).bool()))


def test_without_zeros_it_is_gptq_of_a_whole_model(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    text = families.tokens(6)
    values = Values(4, 32)
    expected = prune_in_memory(source, [text], RoundAll(values), Mask(torch.ones(1)), "linear", torch.float32)
    prune(source, output=tmp_path / "out", calibration=text, method="sparsegpt", pattern="0%", values=values)
    rounded = tensors_of(tmp_path / "out")
    for linear in linear_names(source):
        same = torch.isclose(rounded[linear], expected[linear], rtol=1e-4, atol=1e-6)
        assert same.float().mean() > 0.98, linear  # what lies halfway may go either way


@pytest.mark.parametrize("method", ["sparsellm", "magnitude"])
def test_zeros_that_are_there_stay(method: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    text = families.tokens(6)
    prune(source, output=tmp_path / "sparse", calibration=text, method="sparsellm", pattern="60%")
    prune(
        tmp_path / "sparse",
        output=tmp_path / "out",
        calibration=text,
        method=method,
        pattern="0%",
        values="int2:group=32",
    )
    sparse, rounded = tensors_of(tmp_path / "sparse"), tensors_of(tmp_path / "out")
    for linear in linear_names(source):
        assert torch.equal(sparse[linear] == 0, rounded[linear] == 0), linear


def test_a_table_says_what_is_rounded(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    table = {"*.q_proj": "0%", "*.mlp.*": "2:4"}
    text = families.tokens(4)
    report = prune(source, output=tmp_path / "out", calibration=text, allocation=table, values="int4")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    scales = read_scales(tmp_path / "out")
    assert {layer.name: layer.pattern for layer in report.layers} == {
        name.removesuffix(".weight"): "0%" if "q_proj" in name else "2:4" for name in scales
    }
    for name in linear_names(source):
        chosen = "q_proj" in name or ".mlp." in name
        assert (name in scales) == chosen
        assert torch.equal(before[name], after[name]) != chosen


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_run_that_was_cut_short_ends_with_the_same_bytes(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16)

    def run(output: str) -> Report:
        return prune(
            source, output=tmp_path / output, calibration=families.tokens(4), pattern="50%", values="int4"
        )

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
    run("out")
    assert not (tmp_path / "out.partial").exists()
    whole, resumed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "out")
    for content in (whole, resumed):
        del content["secateurs.json"]  # it has seconds
    assert resumed == whole
    assert SCALES in whole


def test_scales_stay_behind_when_weights_change(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    text = families.tokens(4)
    prune(source, output=tmp_path / "rounded", calibration=text, method="wanda", values="int4")
    assert (tmp_path / "rounded" / SCALES).exists()
    prune(tmp_path / "rounded", output=tmp_path / "again", calibration=text, method="wanda", pattern="60%")
    assert not (tmp_path / "again" / "quantised").exists()
    to = {"towards": source, "calibration": text, "tokens": 64}
    for output, rate in (("better", 1e-3), ("worse", 2.0)):
        report = recover(tmp_path / "rounded", output=tmp_path / output, learning_rate=rate, **to)
        # Where nothing was gained the weights are as they were, and so are the scales.
        assert (tmp_path / output / SCALES).exists() != report.kept
    assert not report.kept


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"values": "int5"}, r"unknown values 'int5'; there are int8, int4, int3, int2$"),
        ({"values": "int4:group=48"}, "group is one of 32, 64, 128, not 48"),
        ({"values": "int4:group=x"}, r"'group=x' of 'int4': expected int$"),
        ({"values": "int4:bits=8"}, "says the bits twice"),
        ({"values": 4}, "values are a name such as int4 or int4:group=32, not 4"),
        ({"values": "int8:grid=half"}, "with 8 bits the grid is whole"),
        ({"pattern": "0%"}, r"outside \(0, 1\)"),
        ({"pattern": "0%", "values": "int4", "allocation": "owl"}, "leave the allocation uniform"),
        ({"allocation": {"*.q_proj": "0%"}}, r"outside \(0, 1\)"),
    ],
)
def test_what_is_refused(chosen: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match=message) as caught:
        prune(source, output=tmp_path / "out", calibration=families.tokens(2), **chosen)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_rounding_is_damped_as_sparsegpt_is(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    errors = []
    for damping in (0.01, 1.0):
        report = prune(
            source,
            output=tmp_path / f"out{damping}",
            calibration=families.tokens(6),
            method=f"sparsegpt:damping={damping}",
            pattern="0%",
            values="int3:group=32",
        )
        errors.append(report.rounding)
    assert errors[0] < errors[1]


def test_a_mask_goes_for_pruning_too() -> None:
    """SparseGPT on given places makes up for what they lose."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    weight, kept = torch.randn(6, 40, generator=generator), torch.rand(6, 40, generator=generator) > 0.5
    statistics = Statistics.from_inputs(inputs)
    pruned = SparseGPT(block=16).solve(weight, statistics, Mask(kept)).weight
    assert torch.equal(pruned != 0, kept)
    assert statistics.error(weight, pruned) < 0.9 * statistics.error(weight, weight * kept)
