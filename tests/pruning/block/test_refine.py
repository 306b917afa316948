"""Refinement against whole models that transformers runs, and against Adam written out."""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import decoders
import secateurs.pruning.block.joint
import secateurs.pruning.block.refine
from families import FAMILIES, build, tokens
from folders import save, tensors_of
from secateurs import Report, SparseLLM, Wanda, prune, ranks
from secateurs.blockwise import Batch, BlockwiseModel
from secateurs.checkpoint import Checkpoint
from secateurs.pruning.block.refine import Refined, _of_steps, refine
from secateurs.pruning.settings import EFFORTS, Effort, PruneSettings
from table import family_of


def first_block(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the first block is given and gives, with gradients."""
    noted: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, given: tuple[Tensor, ...], result: Any) -> None:
        noted.append((given[0], result[0] if isinstance(result, tuple) else result))

    block = model.get_submodule(family_of(model.config).blocks)[0]  # type: ignore[index]
    handle = block.register_forward_hook(note)
    model(ids, use_cache=False)
    handle.remove()
    return noted[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_reports_what_it_gains_and_touches_what_is_pruned(name: str, tmp_path: Path) -> None:
    ids = tokens(batch=96)
    settings: Any = {
        "calibration": ids,
        "method": Wanda(),
        "pattern": "50%",
        "target": "dense",
        "batch_size": 40,
        "repair": 1.0,
    }
    dense = save(tmp_path / "dense", name)
    prune(dense, output=tmp_path / "before", **settings)
    report = prune(dense, output=tmp_path / "after", refine=3, **settings)
    assert (report.settings["refine"], report.settings["repair"]) == (3, 1.0)
    assert len(report.refinements) == 3
    assert any(block.after < block.before for block in report.refinements)
    pruned = {layer.name for layer in report.layers}
    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    moved = set()
    for tensor in before:
        if not torch.equal(before[tensor], after[tensor]):
            moved.add(tensor)
            zeros = [(tensors[tensor] == 0).sum() for tensors in (before, after)]
            assert zeros[0] == zeros[1]
            if ".0." in tensor:  # later blocks see other inputs, by which their zeros are chosen
                assert torch.equal(before[tensor] == 0, after[tensor] == 0)
    layers = {tensor.rpartition(".")[0] for tensor in moved}
    assert layers
    assert all(any(layer.endswith(name) for layer in pruned) for name in layers)

    errors = []
    given, wanted = (
        part[::8].detach() for part in first_block(AutoModelForCausalLM.from_pretrained(dense), ids)
    )
    everything_given, everything = first_block(AutoModelForCausalLM.from_pretrained(dense), ids)
    energy = (everything - everything_given).detach().square().sum() / len(ids)
    for folder in ("before", "after"):
        _, result = first_block(AutoModelForCausalLM.from_pretrained(tmp_path / folder), ids)
        errors.append(float((result[::8] - wanted).detach().square().sum() / energy / len(given)))
    first = report.refinements[0]
    assert first.after is not None
    assert [first.before, min(first.before, first.after)] == pytest.approx(errors, rel=1e-3)


def test_what_it_finds_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases too, in the files' dtype, with n:m held; and what is not pruned stays."""
    found: list[dict[str, Tensor]] = []

    def note(*args: Any, **kwargs: Any) -> Refined:
        found.append((refined := refine(*args, **kwargs)).parameters or {})
        return refined

    monkeypatch.setattr(secateurs.pruning.block.joint, "refined_by_descent", note)
    monkeypatch.setattr(
        secateurs.pruning.block.refine, "TOKENS_A_STEP", 240
    )  # enough steps to gain something
    dense = save(tmp_path / "dense", "llama-bias", dtype=torch.bfloat16)
    report = prune(
        dense,
        output=tmp_path / "pruned",
        calibration=tokens(batch=96),
        method="wanda",
        target="dense",
        allocation={"*.k_proj": None, "*.layers.1.*": None, "*": "2:4"},
        refine=6,
    )
    assert [block.name for block in report.refinements] == ["model.layers.0", "model.layers.2"]
    before, after = tensors_of(dense), tensors_of(tmp_path / "pruned")
    for index, parameters in zip((0, 2), found, strict=True):
        assert len(parameters) == 12
        for name, tensor in parameters.items():
            saved = after[f"model.layers.{index}.{name}"]
            assert saved.dtype == torch.bfloat16
            assert torch.equal(saved, tensor)
            if name.endswith("weight"):
                assert ((saved != 0).view(len(saved), -1, 4).sum(dim=-1) <= 2).all()
    for name in before:
        if "k_proj" in name or ".1." in name or "norm" in name:
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(("tokens_a_step", "length", "together"), [(72, 24, 3), (16, 16, 1)])
def test_its_steps_are_those_of_adam_where_weights_are_left(
    tokens_a_step: int, length: int, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several sequences at a time; or on what one of them begins with, if it is longer than a step."""
    monkeypatch.setattr(secateurs.pruning.block.refine, "TOKENS_A_STEP", tokens_a_step)
    ids, name, passes = tokens(batch=10), "model.layers.0.mlp.up_proj.weight", 2
    blockwise = BlockwiseModel(Checkpoint(save(tmp_path / "dense", "llama")), torch.device("cpu"))
    hidden = blockwise.embed(ids, batch_size=4, head=tokens_a_step)
    with blockwise.block(0):
        targets = [blockwise.run(0, states) for states in hidden]
        up = blockwise.model.get_parameter(name)
        up.data *= torch.rand(up.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        start = up.detach().clone()
        up.data = running = start.bfloat16().float()  # a block may run in less than is stored
        stored = {"mlp.up_proj.weight": start}
        found = refine(blockwise, 0, stored, hidden, targets, passes=passes)
        assert torch.equal(up, running)

    model = build("llama").double()
    wanted = torch.cat(targets).double()
    weight = model.get_parameter(name)
    weight.data = start.double()
    given, _ = first_block(model, ids)
    energy = (wanted - given.detach()).square().sum() / 10
    order = torch.Generator().manual_seed(0)
    first_moment, second_moment = torch.zeros_like(weight), torch.zeros_like(weight)
    rate = min(0.0125, 3 / given.shape[-1]) * start[start != 0].double().square().mean().sqrt()
    step, steps = 0, passes * math.ceil(10 / together)
    warm_up = 1 + steps // 4
    for _ in range(passes):
        for chosen in torch.randperm(10, generator=order).split(together):
            some = chosen.tolist()
            _, result = first_block(model, ids[some, :length])
            loss = (result - wanted[some, :length]).square().sum() / energy / len(some)
            (gradient,) = torch.autograd.grad(loss, weight)
            gradient = gradient * (start != 0)
            first_moment = 0.9 * first_moment + 0.1 * gradient
            second_moment = 0.95 * second_moment + 0.05 * gradient**2
            scaled = second_moment / (1 - 0.95 ** (step + 1))
            now = rate * min(1, (step + 1) / warm_up) * (1 - step / steps)
            weight.data -= now * first_moment / (1 - 0.9 ** (step + 1)) / (scaled.sqrt() + 1e-8)
            step += 1
    assert found.parameters is not None
    moved = found.parameters["mlp.up_proj.weight"] - start
    assert moved.norm() > 0
    torch.testing.assert_close(moved, (weight.detach() - start).float(), rtol=0.02, atol=float(rate) * 1e-2)


@pytest.mark.parametrize(("positions", "cut"), [("default", True), ("dynamic", False)])
def test_beginnings_count_only_where_they_stand_for_themselves(
    positions: str, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic positions turn by another angle in a longer sequence: though what the block adds to the first
    token, which sees itself alone, does not depend on that, and has nearly all of the energy."""
    monkeypatch.setattr(secateurs.pruning.block.refine, "TOKENS_A_STEP", 12)
    dense = save(tmp_path / "dense", "llama")
    config = json.loads((dense / "config.json").read_text())
    rope = {"rope_type": positions, "rope_theta": 10.0, "factor": 8.0}
    config |= {"rope_parameters": rope, "max_position_embeddings": 16}
    (dense / "config.json").write_text(json.dumps(config))
    blockwise = BlockwiseModel(Checkpoint(dense), torch.device("cpu"))
    hidden = blockwise.embed(tokens(batch=4), batch_size=2, head=12)
    lengths: list[int] = []
    run_with = blockwise.run_with

    def note(index: int, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            lengths.append(batch.states.shape[1])
        added = run_with(index, batch, parameters) - batch.states
        return batch.states + torch.cat([1000 * added[:, :1], added[:, 1:]], dim=1)

    monkeypatch.setattr(blockwise, "run_with", note)
    with blockwise.block(0) as block:
        stored = {"mlp.up_proj.weight": block.get_parameter("mlp.up_proj.weight").detach().clone()}
        parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
        with torch.no_grad():
            targets = [blockwise.run_with(0, batch, parameters) for batch in hidden]
        found = refine(blockwise, 0, stored, hidden, targets, passes=1)
    assert found.tokens == (12 if cut else 24)
    assert lengths == [found.tokens] * 4


@pytest.mark.parametrize("name", ["gemma3n_text", "cpmant", "mamba2", "openai-gpt", "bloom"])
def test_a_block_gives_for_a_beginning_what_it_gives_within_the_whole(name: str, tmp_path: Path) -> None:
    """Whatever the states look like. CPM-Ant, which puts tokens of its own before the first, has none."""
    blockwise = BlockwiseModel(Checkpoint(decoders.save(name, tmp_path / "dense")), torch.device("cpu"))
    hidden = blockwise.embed(decoders.tokens(3, 24), batch_size=2, head=16)
    if name == "cpmant":
        assert blockwise.head is None
        return
    head = blockwise.head
    assert head is not None
    assert (head.length, blockwise.length) == (16, 24)
    with blockwise.block(0):
        for batch in hidden:
            whole = blockwise.run(0, batch)
            for part, result in zip(batch.split(), batch.split_like(whole), strict=True):
                torch.testing.assert_close(blockwise.run(0, head.of(part)), head.of_tensor(result))
            joined = Batch.joined([head.of(part) for part in batch.split()])
            torch.testing.assert_close(blockwise.run(0, joined), head.of_tensor(whole))
    with pytest.raises(ValueError, match="a part of the tokens"):
        head.of(replace(hidden[0], shared={"keys": torch.zeros(2)}))


def test_products_in_half_precision_gain_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a caller who has autocast on."""
    monkeypatch.setattr(secateurs.pruning.block.refine, "TOKENS_A_STEP", 72)
    ids, name = tokens(batch=40), "mlp.up_proj.weight"
    dense = save(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    blockwise = BlockwiseModel(Checkpoint(dense), torch.device("cpu"))
    hidden = blockwise.embed(ids, batch_size=4)
    found = []
    with blockwise.block(0):
        targets = [blockwise.run(0, states) for states in hidden]
        up = blockwise.model.get_parameter(f"model.layers.0.{name}")
        up.data *= torch.rand(up.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        for fast, within in ((False, False), (True, False), (True, True)):
            monkeypatch.setattr(
                secateurs.pruning.block.refine, "multiplies_bfloat16", lambda device, fast=fast: fast
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                found.append(refine(blockwise, 0, {name: up.detach()}, hidden, targets, passes=10))
    assert found[0].before != found[1].before
    gains = [refined.before - refined.after for refined in found]
    assert gains[0] > 0.03
    assert gains == pytest.approx([gains[0]] * 3, rel=0.05)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_descent_that_makes_it_worse_is_not_taken(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secateurs.pruning.block.refine, "RATE", rate)
    monkeypatch.setattr(secateurs.pruning.block.refine, "MOST_RATE", rate)
    settings: Any = {"calibration": tokens(batch=4), "method": "wanda", "target": "block"}
    dense = save(tmp_path / "dense", "opt")
    prune(dense, output=tmp_path / "before", **settings)
    report = prune(dense, output=tmp_path / "after", refine=1, **settings)
    for block in report.refinements:
        assert block.after is None or block.after >= block.before
    assert report == Report.read(tmp_path / "after")
    for name, tensor in tensors_of(tmp_path / "before").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "after")[name])


@pytest.mark.parametrize(
    ("samples", "length", "passes"),
    [
        (4, 512, {"fast": 2, "default": 6, "best": 20}),  # few steps: not more passes for it
        (64, 256, {"fast": 2, "default": 6, "best": 20}),
        (32, 2048, {"fast": 2, "default": 6, "best": 20}),
        (64, 512, {"fast": 1, "default": 3, "best": 10}),
        (128, 2048, {"fast": 1, "default": 2, "best": 5}),
        (1024, 512, {"fast": 1, "default": 1, "best": 1}),
    ],
)
def test_passes_follow_effort_and_text(samples: int, length: int, passes: dict[Effort, int]) -> None:
    for effort, wanted in passes.items():
        settings = PruneSettings(output="out", calibration="self", effort=effort)
        assert settings.resolved(samples, length).refine == wanted


def test_effort_says_what_is_left_open() -> None:
    def iterations(**settings: Any) -> int:
        solver = PruneSettings(output="out", calibration="self", **settings).solver
        assert isinstance(solver, SparseLLM)
        return solver.iterations

    found = [iterations(effort=effort) for effort in EFFORTS]
    assert found == sorted(found)
    assert found[0] < found[-1]
    assert iterations(effort="best", method="sparsellm:iterations=0") == 0
    assert iterations(effort="fast", method="sparsellm:solver=sparsegpt") == 0
    assert iterations(effort="fast", method=SparseLLM(iterations=3)) == 3


def test_passes_that_are_given_stay() -> None:
    assert PruneSettings(output="out", calibration="self", refine=7).resolved(128, 2048).refine == 7
    assert PruneSettings(output="out", calibration="self", target="layer").resolved(8, 64).refine == 0
    assert PruneSettings(output="out", calibration="self", method="admm").resolved(8, 64).refine == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effort": "slow"}, "'slow' is none of fast, default, best"),
        ({"effort": "best", "method": "wanda"}, "the effort 'best' is for sparsellm"),
        ({"refine": -1}, "refine is a number of passes, not -1"),
        ({"refine": 1.5}, "refine is a number of passes, not 1.5"),
        ({"repair": 0.0}, "for 0, set target to block"),
        ({"repair": 0.5, "target": "block"}, "repair goes with the target dense, not with block"),
        ({"refine": 2, "target": "layer"}, "set target to block or dense"),
        ({"refine": 2, "method": "wanda"}, "set target to block or dense"),
    ],
)
def test_settings_that_leave_nothing_to_refine(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match=message):
        prune(folder, **{"output": tmp_path / "out", "calibration": tokens(), **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("world", "sequences", "together"), [(1, 5, 2), (2, 7, 2), (3, 8, 4), (2, 5, 1)])
def test_ranks_share_each_step_and_see_all_their_sequences_in_a_pass(
    world: int, sequences: int, together: int
) -> None:
    steps = -(-sequences // together)
    sizes = [0] * steps
    for rank in range(world):
        with ranks._placed(ranks._Place(rank, world)):
            own = ranks.part_of(sequences)
            seen = list(islice(_of_steps(own, sequences, together, torch.Generator()), 2 * steps))
        for once in (seen[:steps], seen[steps:]):
            assert sorted(i for some in once for i in some) == list(range(own))
        sizes = [size + len(some) for size, some in zip(sizes, seen, strict=False)]
    assert sizes == [min(together, sequences - first) for first in range(0, sequences, together)]
