"""The embedding and the head rounded: by what the head is given, and nothing else changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_walk import linear_names
from torch import Tensor

import decoders
import families
from folders import bytes_of, rewrite, save, tensors_of
from secateurs import Report, Statistics, compress, prune
from secateurs.blockwise import BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.scales import read_scales
from secateurs.pattern import Mask
from secateurs.pruning import walk
from secateurs.pruning.folder import WorkFolder
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.tables import tables_of
from secateurs.runtime.load import load_model
from secateurs.values import Values

GRID = Values(4, 32)
TIED = ["smollm3", "gemma3_text", "opt", "cohere", "mistral3"]


def given_to_head(folder: Path, ids: Tensor) -> Tensor:
    """By a hook on the whole model."""
    model: Any = load_model(folder, dtype=torch.float32)
    given: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    return given[0]


def solved(weight: Tensor, statistics: Statistics, damping: float) -> Tensor:
    every = Mask(torch.ones_like(weight, dtype=torch.bool))
    return Rounding(GRID, damping=damping, shrinkage=0.0).solve(weight, statistics, every).weight


@pytest.mark.parametrize("name", ["smollm3", "gemma3_text", "opt", "cohere", "mistral3"])
def test_one_table_is_rounded_by_what_the_head_is_given_and_a_tenth(name: str, tmp_path: Path) -> None:
    source, ids = decoders.save(name, tmp_path / "source"), decoders.tokens(6)
    text: dict[str, Any] = {"calibration": ids, "method": "wanda", "pattern": "50%", "device": "cpu"}
    prune(source, output=tmp_path / "pruned", **text)
    report = prune(source, output=tmp_path / "out", embedding=GRID, **text)
    pruned, out = tensors_of(tmp_path / "pruned"), tensors_of(tmp_path / "out")
    (changed,) = (key for key in out if not torch.equal(out[key], pruned[key]))
    statistics = Statistics.from_inputs(given_to_head(tmp_path / "pruned", ids))
    expected = solved(pruned[changed], statistics, 0.1)
    same = torch.isclose(out[changed], expected, rtol=1e-4, atol=1e-6)
    assert same.float().mean() > 0.98  # what lies halfway may go either way
    (parameter,) = read_scales(tmp_path / "out")
    (table,) = report.tables
    assert table.parameters[0] == parameter
    assert table.error == pytest.approx(statistics.error(pruned[changed], out[changed]), rel=1e-3)
    nearest = solved(pruned[changed], Statistics.from_inputs(torch.eye(expected.shape[1])), 0.01)
    assert table.error < 0.9 * statistics.error(pruned[changed], nearest)
    assert Report.read(tmp_path / "out") == report


def test_two_tables_are_rounded_each_by_its_own(tmp_path: Path) -> None:
    source, ids = save(tmp_path / "source", "llama"), families.tokens(6)
    report = prune(
        source, output=tmp_path / "out", calibration=ids, method="sparsegpt", pattern="0%", embedding=GRID
    )
    dense, out = tensors_of(source), tensors_of(tmp_path / "out")
    changed = {key for key in out if not torch.equal(out[key], dense[key])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not report.layers
    assert report.title == "model.embed_tokens and lm_head to 4 bits"
    statistics = {
        "model.embed_tokens.weight": Statistics.from_inputs(torch.eye(dense["lm_head.weight"].shape[1])),
        "lm_head.weight": Statistics.from_inputs(given_to_head(source, ids)),
    }
    for key in changed:
        same = torch.isclose(out[key], solved(dense[key], statistics[key], 0.01), rtol=1e-4, atol=1e-6)
        assert same.float().mean() > 0.98, key


def test_without_text_all_inputs_count_alike(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "gpt2")
    settings: dict[str, Any] = {"method": "magnitude", "pattern": "50%", "values": "int8"}
    prune(source, output=tmp_path / "out", embedding=GRID, **settings)
    dense, out = tensors_of(source), tensors_of(tmp_path / "out")
    weight = dense["transformer.wte.weight"]
    expected = solved(weight, Statistics.from_inputs(torch.eye(weight.shape[1])), 0.1)
    same = torch.isclose(out["transformer.wte.weight"], expected, rtol=1e-4, atol=1e-6)
    assert same.float().mean() > 0.98
    scales = read_scales(tmp_path / "out")
    assert scales.pop("transformer.wte.weight")[0] == GRID
    assert {values for values, _ in scales.values()} == {Values(8)}


def test_a_run_that_was_cut_short_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16)

    def run(output: str) -> Report:
        return prune(source, output=tmp_path / output, calibration=families.tokens(4), embedding="int4")

    run("whole")
    for place, owner in (("tables", WorkFolder), ("complete", WorkFolder), ("round_tables", walk)):
        with monkeypatch.context() as patch:

            def stop(*_: Any, **__: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(owner, place, stop)
            with pytest.raises(KeyboardInterrupt):
                run(place)
        run(place)
        whole, resumed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / place)
        for content in (whole, resumed):
            del content["secateurs.json"]  # it has seconds
        assert resumed == whole


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("llama", [("model.embed_tokens.weight",), ("lm_head.weight",)]),
        ("gpt2", [("transformer.wte.weight", "lm_head.weight")]),
    ],
)
def test_which_tables_there_are(name: str, tables: list[tuple[str, ...]], tmp_path: Path) -> None:
    model = BlockwiseModel(Checkpoint(save(tmp_path / name, name)), torch.device("cpu"))
    found = tables_of(model)
    assert [table.parameters for table in found] == tables
    assert [(table.read, table.multiplied) for table in found] in (
        [(True, True)],
        [(True, False), (False, True)],
    )


def test_what_the_files_do_not_hold_as_one_is_not_rounded_as_one(tmp_path: Path) -> None:
    """transformers ties only what is equal."""
    source = decoders.save("smollm3", tmp_path / "source")
    tensors = tensors_of(source)
    name, other = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(source, {**tensors, other: tensors[name].clone()})
    settings: dict[str, Any] = {"method": "magnitude", "pattern": "50%", "device": "cpu"}
    prune(source, output=tmp_path / "same", embedding="int8", **settings)
    out = tensors_of(tmp_path / "same")
    assert torch.equal(out[name], out[other])
    assert not torch.equal(out[name], tensors[name])
    done = compress(tmp_path / "same", tmp_path / "small")
    assert done.coded == 1
    assert other not in tensors_of(tmp_path / "small")
    ids = decoders.tokens(2, 16)
    with torch.no_grad():
        wanted, given = (load_model(tmp_path / f)(input_ids=ids).logits for f in ("same", "small"))
    assert (given - wanted).norm() < 0.02 * wanted.norm()
    rewrite(source, {**tensors, other: torch.randn_like(tensors[name])})
    with pytest.raises(
        ValueError, match=r"\A[^\n]*cannot be packed|can be packed as codes: leave embedding out"
    ):
        prune(source, output=tmp_path / "other", embedding="int8", **settings)


@pytest.mark.parametrize("name", ["ctrl", "mamba", "gemma4"])
def test_what_cannot_be_packed_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    """A head with a bias; a weight that is read for its dtype; rows of a weight read otherwise."""
    source = decoders.save(name, tmp_path / "source")
    with pytest.raises(ValueError, match=r"\A[^\n]*can be packed as codes: leave embedding out\Z"):
        prune(source, output=tmp_path / "out", method="magnitude", embedding="int8")
    assert not (tmp_path / "out.partial").exists()


def test_a_head_that_sees_more_than_the_last_block_is_rounded_like_rows(tmp_path: Path) -> None:
    source, ids = decoders.save("inkling2_text", tmp_path / "source"), decoders.tokens(4)
    report = prune(
        source, output=tmp_path / "out", calibration=ids, method="wanda", embedding="int8", device="cpu"
    )
    assert [table.by_head for table in report.tables] == [False, False]
    source = save(tmp_path / "llama", "llama")
    report = prune(
        source, output=tmp_path / "o", calibration=families.tokens(4), method="wanda", embedding="int8"
    )
    assert [table.by_head for table in report.tables] == [False, True]


@pytest.mark.parametrize("first", ["values", "embedding"])
def test_what_was_rounded_before_stays_so(first: str, tmp_path: Path) -> None:
    source, text = save(tmp_path / "source", "llama"), families.tokens(4)
    rounds = {"values": "int4", "embedding": "int8"}
    second = (rounds.keys() - {first}).pop()
    settings: dict[str, Any] = {"calibration": text, "method": "sparsegpt", "pattern": "0%"}
    prune(source, output=tmp_path / "first", **{first: rounds[first]}, **settings)
    prune(tmp_path / "first", output=tmp_path / "both", **{second: rounds[second]}, **settings)
    before, after = read_scales(tmp_path / "first"), read_scales(tmp_path / "both")
    assert len(after) == len(linear_names(source)) + 2
    assert all(torch.equal(after[name][1], scales) for name, (_, scales) in before.items())
    assert compress(tmp_path / "both", tmp_path / "small").coded == len(after)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"embedding": "int5"}, "unknown values 'int5'"),
        ({"embedding": 4}, "values are a name such as int4 or int4:group=32, not 4"),
    ],
)
def test_what_is_refused(chosen: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match=message) as caught:
        prune(source, output=tmp_path / "out", calibration=families.tokens(2), **chosen)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_experts_are_dropped_first(tmp_path: Path) -> None:
    """Each has tensors of its own in the files."""
    source = decoders.save("mixtral", tmp_path / "source")
    report = prune(
        source,
        output=tmp_path / "out",
        calibration=decoders.tokens(4),
        experts="50%",
        pattern="0%",
        embedding="int8",
        device="cpu",
    )
    assert report.choice
    assert report.tables
    assert compress(tmp_path / "out", tmp_path / "small").coded == len(report.tables)


def test_a_table_stored_as_the_head_s_is_not_rounded(tmp_path: Path) -> None:
    """compress could not pack it."""
    source = decoders.save("smollm3", tmp_path / "source")
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(source, tensors)
    with pytest.raises(ValueError, match="can be packed as codes: leave embedding out"):
        prune(source, output=tmp_path / "out", method="magnitude", embedding="int8")
