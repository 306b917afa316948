"""Recovering a rounded folder: its weights stay on their grids, and their scales are what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import decoders
import folders
from secateurs import compress, prune, recover
from secateurs.checkpoint.scales import read_scales, write_scales
from secateurs.recovery.levels import Levels, homes_of
from secateurs.runtime.packable import Packable
from secateurs.values import Values, parse_values

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(150))
QUICK: dict[str, Any] = {"length": 32, "tokens": 12_288, "learning_rate": 3e-3, "device": "cpu"}
ROUNDING: dict[str, Any] = {"samples": 8, "length": 32, "method": "sparsegpt", "device": "cpu"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def levels_of(values: Values, weight: Tensor, scales: Tensor) -> Tensor:
    """(..., rows, columns), float64, one column after another; 0 where a weight is 0."""
    levels = torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(weight.shape[-1]):
        scale = scales[..., column // values.group].double()
        ratio = weight[..., column].double() / torch.where(scale == 0, 1, scale)
        levels[..., column] = ((ratio - values.lowest) / values.step).round() * values.step + values.lowest
    return levels * (weight != 0)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.sampled_from(["int2", "int2:grid=whole", "int3", "int4", "int8"]),
    columns=st.integers(1, 90),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_group_goes_to_its_nearest_multiple(grid: str, columns: int, zeros: float, seed: int) -> None:
    """Against least squares in float64, group by group, of a step that led anywhere."""
    random = torch.Generator().manual_seed(seed)
    values = parse_values(f"{grid}:group=32".replace(":grid=whole:", ":grid=whole,"))
    codes = torch.randint(0, 2**values.bits, (3, columns), generator=random)
    scales = torch.randn(3, values.groups(columns), generator=random).bfloat16()
    weight = values.decode(codes.to(torch.uint8), scales)
    weight *= torch.rand(weight.shape, generator=random) >= zeros
    layer = nn.Linear(columns, 3)
    layer.weight.data.copy_(weight)
    home = Packable("weight", "weight", (3, columns))
    levels = Levels(layer, {"weight": (values, scales)}, {"weight": home})
    assert levels.count == weight.numel()
    step = torch.randn(weight.shape, generator=random)
    layer.weight.data.add_(step)
    levels.apply()
    known = levels_of(values, weight, scales)
    for row in range(3):
        for start in range(0, columns, 32):
            group = slice(start, start + 32)
            direction, moved = known[row, group], (weight + step)[row, group].double()
            square = direction @ direction
            wanted = direction * (direction @ moved) / square if square else direction
            torch.testing.assert_close(
                layer.weight.detach()[row, group].double(), wanted, rtol=1e-4, atol=1e-5
            )
    assert not torch.signbit(layer.weight[layer.weight == 0]).any()


def test_a_gradient_is_that_of_the_scales() -> None:
    """What a step of plain descent on the projected gradient does to a scale is what autograd says of it."""
    random = torch.Generator().manual_seed(0)
    values = parse_values("int3:group=32")
    scales = (0.1 * torch.rand(4, 2, generator=random) + 0.05).bfloat16()
    codes = torch.randint(0, 8, (4, 64), generator=random).to(torch.uint8)
    layer, inputs = nn.Linear(64, 4, bias=False), torch.randn(16, 64, generator=random)
    layer.weight.data.copy_(values.decode(codes, scales))
    home = Packable("weight", "weight", (4, 64))
    levels = Levels(layer, {"weight": (values, scales)}, {"weight": home})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    levels.attach(optimizer)
    layer(inputs).square().mean().backward()
    optimizer.step()
    levels.detach()

    free = scales.double().requires_grad_()
    level = codes.double() - 4
    product = inputs.double() @ (level * free.repeat_interleave(32, dim=1)).T
    product.square().mean().backward()
    # A scale moves all the weights of its group: by the length of its levels.
    square = level.unflatten(1, (2, 32)).square().sum(-1)
    assert free.grad is not None
    wanted = level * (free.detach() - 0.01 * free.grad / square).repeat_interleave(32, dim=1)
    torch.testing.assert_close(layer.weight.detach().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "pattern", "values", "embedding"),
    [
        ("llama", "0%", "int3:group=32", "int4:group=32"),
        ("gpt2", "50%", "int2:group=32", None),  # stored (in, out), and a grid without 0 behind a mask
        ("qwen3_moe", "0%", "int4:group=32", None),
    ],
)
def test_what_comes_out_is_on_its_grids(
    family: str, pattern: str, values: str, embedding: str | None, text: Path, tmp_path: Path
) -> None:
    dense, rounded, output = decoders.save(family, tmp_path / "dense"), tmp_path / "r", tmp_path / "out"
    prune(
        dense,
        output=rounded,
        calibration=text,
        pattern=pattern,
        values=values,
        embedding=embedding,
        **ROUNDING,
    )
    report = recover(rounded, towards=dense, calibration=text, output=output, **QUICK)
    assert report.kept
    assert report.rounded > 0
    assert f"{report.rounded} weights stay on the grids" in str(report)
    before, after = read_scales(rounded), read_scales(output)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name][1], after[name][1]) for name in before)
    # Smaller, and the same: all that was rounded is found on its grid.
    for folder in (rounded, output):
        compress(folder, output=folder.with_name(f"{folder.name}-small"))
    sizes = [
        sum(len(content) for name, content in folders.bytes_of(tmp_path / name).items() if "safetens" in name)
        for name in ("r-small", "out-small")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    old, new = folders.tensors_of(rounded), folders.tensors_of(output)
    for name in old:
        assert (new[name] == 0)[old[name] == 0].all(), name
        assert not torch.signbit(new[name][new[name] == 0]).any()
    if embedding:
        name = "model.embed_tokens.weight"
        (grid, was), (_, now) = before[name], after[name]
        assert torch.equal(levels_of(grid, old[name], was), levels_of(grid, new[name], now))


def test_where_nothing_is_gained_scales_stay(text: Path, tmp_path: Path) -> None:
    dense, rounded = decoders.save("llama", tmp_path / "dense"), tmp_path / "rounded"
    prune(dense, output=rounded, calibration=text, pattern="0%", values="int4:group=32", **ROUNDING)
    worse = {**QUICK, "tokens": 2048, "learning_rate": 2.0}
    assert not recover(rounded, towards=dense, calibration=text, output=tmp_path / "out", **worse).kept
    for (_, was), (_, now) in zip(
        read_scales(rounded).values(), read_scales(tmp_path / "out").values(), strict=True
    ):
        assert torch.equal(was, now)


def test_pruned_rounded_and_recovered_in_one_command(text: Path, tmp_path: Path) -> None:
    dense = decoders.save("llama", tmp_path / "dense")
    prune(
        dense,
        output=tmp_path / "out",
        calibration=text,
        pattern="50%",
        values="int4:group=32",
        recover=6_144,
        **ROUNDING,
    )
    assert compress(tmp_path / "out", output=tmp_path / "small").bytes_after > 0
    assert read_scales(tmp_path / "out")


def test_adapters_are_refused(text: Path, tmp_path: Path) -> None:
    dense, rounded = decoders.save("llama", tmp_path / "dense"), tmp_path / "rounded"
    prune(dense, output=rounded, calibration=text, pattern="0%", values="int4:group=32", **ROUNDING)
    with pytest.raises(ValueError, match=r"was rounded, and adapters would .* leave lora out"):
        recover(rounded, towards=dense, calibration=text, output=tmp_path / "out", lora=4, **QUICK)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changed", "wanted"), [("name", "scales of 'a', which the model does not have"), ("shape", "suit")]
)
def test_scales_of_another_model_are_found_before_the_work(
    changed: str, wanted: str, text: Path, tmp_path: Path
) -> None:
    dense = decoders.save("llama", tmp_path / "dense")
    weight = "model.layers.0.mlp.up_proj.weight"
    scales = torch.ones(1, 2, dtype=torch.bfloat16)
    write_scales(dense, {"a" if changed == "name" else weight: (parse_values("int4"), scales)})
    with pytest.raises(ValueError, match=wanted):
        recover(dense, towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_be_packed_has_no_levels_to_hold() -> None:
    """Inkling multiplies by a matrix of its own that `prune` rounds and `compress` leaves dense."""
    model = decoders.build("inkling_text", torch.float32)
    name = "model.layers.1.self_attn.rel_logits_proj.proj"
    packed = "model.layers.1.self_attn.o_proj.weight"
    values = parse_values("int4")
    rows, columns = model.get_parameter(packed).shape
    grids = {
        name: (values, torch.ones(1, 1, dtype=torch.bfloat16)),
        packed: (values, torch.ones(rows, values.groups(columns), dtype=torch.bfloat16)),
    }
    assert homes_of(model, grids).keys() == {packed}


def test_weights_that_have_moved_are_trained_as_any_other(text: Path, tmp_path: Path) -> None:
    """They have scales still, but these are not theirs any more."""
    dense, rounded = decoders.save("llama", tmp_path / "dense"), tmp_path / "rounded"
    prune(dense, output=rounded, calibration=text, pattern="0%", values="int4:group=32", **ROUNDING)
    tensors = folders.tensors_of(rounded)
    moved = next(iter(read_scales(rounded)))
    tensors[moved] = torch.randn_like(tensors[moved]) * 0.02
    folders.rewrite(rounded, tensors)
    recover(rounded, towards=dense, calibration=text, output=tmp_path / "out", **QUICK)
    assert read_scales(tmp_path / "out").keys() == read_scales(rounded).keys() - {moved}
