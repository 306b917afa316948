"""What is found in hand-made matrices, and in model folders of every kind, against counting by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.test_plot import assert_pictures
from families import tokens
from folders import rewrite, save, tensors_of
from secateurs import compress, inspect, prune
from secateurs.evaluation.inspect import print_tables
from secateurs.evaluation.inspect_pictures import draw
from secateurs.evaluation.inspection import (
    BINS,
    QUANTILES,
    REACH,
    Inspection,
    LayerInspection,
    inspect_layer,
)
from secateurs.pattern import NM, Unstructured
from secateurs.values import Values


def look(weight: Tensor, dense: Tensor | None = None) -> LayerInspection:
    return inspect_layer("model.layers.7.mlp.up_proj", "up", weight, dense)


def test_structure_of_a_matrix_made_by_hand() -> None:
    weight = torch.tensor(
        [
            [1.0, 0.0, 0.0, 2.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 3.0, 0.0, 4.0, 0.0, -5.0],
            [0.0, 0.0, 0.0, 6.0, 0.0, 0.0],
        ]
    )
    found = look(weight)
    assert (found.block, found.kind, found.shape, found.weights) == (7, "up", (4, 6), 24)
    assert found.sparsity == 18 / 24
    rows, columns = found.rows, found.columns
    assert (rows.least, rows.mean, rows.most, rows.dead) == (3 / 6, 18 / 24, 1.0, 1)
    assert (columns.least, columns.mean, columns.most, columns.dead) == (1 / 4, 18 / 24, 1.0, 2)
    assert found.before is None
    assert found.largest_kept is None
    assert found.after.quantiles[QUANTILES.index(0.5)] in (3.0, 4.0)  # of 1 2 3 4 5 6
    assert sum(found.after.histogram) == 6


def test_how_many_of_the_largest_were_kept() -> None:
    """The 10 largest of 1000, and the 100 largest: here all but some that are cut by hand."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randperm(1000, generator=generator).float().add(1).mul(1 - 2 * (torch.arange(1000) % 2))
    pruned = dense.clone()
    pruned[dense.abs() <= 500] = 0
    pruned[(dense.abs() > 990) & (dense.abs() <= 993)] = 0
    pruned[(dense.abs() > 900) & (dense.abs() <= 905)] = 0
    found = look(pruned.view(20, 50), dense.view(20, 50))
    assert found.largest_kept == pytest.approx((1 - 3 / 10, 1 - 8 / 100))
    assert look(torch.zeros(20, 50), dense.view(20, 50)).largest_kept == (0.0, 0.0)


def test_equals_of_the_last_count_among_the_largest() -> None:
    dense = torch.ones(10, 10)
    pruned = dense.clone()
    pruned[0] = 0
    assert look(pruned, dense).largest_kept == pytest.approx((0.9, 0.9))


@pytest.mark.parametrize("size", [(40, 48), (2100, 2048)])  # one chunk of the histogram, and two
def test_distribution_against_numpy(size: tuple[int, int]) -> None:
    dense = torch.randn(*size, generator=torch.Generator().manual_seed(0)) * 0.03
    pruned = torch.where(dense.abs() > 0.02, dense * 1.1, 0)
    found = look(pruned, dense)
    unit = math.sqrt(dense.double().square().mean())
    for distribution, weight in ((found.before, dense), (found.after, pruned)):
        assert distribution is not None
        values = weight[weight != 0].double().numpy()
        expected, _ = np.histogram(np.clip(values / unit, -REACH, REACH), BINS, (-REACH, REACH))
        # In float32 a weight next to an edge may fall on its other side.
        assert np.abs(np.array(distribution.histogram) - expected).max() <= max(2, 1e-5 * len(values))
        assert sum(distribution.histogram) == len(values)
        ordered = np.sort(np.abs(values))
        nearest = [ordered[round(quantile * (len(ordered) - 1))] for quantile in QUANTILES]
        assert distribution.quantiles == pytest.approx(tuple(nearest), rel=1e-6)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NM(2, 4), "2:4"), (NM(1, 4), "1:4"), (NM(4, 8), "4:8"), (NM(1, 2), "1:2"), (NM(3, 16), "3:16"),
        (Unstructured(0.5), None), (Unstructured(0.9), None), (Unstructured(0.0), None),
    ],
)  # fmt: skip
def test_patterns_that_hold(pattern: NM | Unstructured, expected: str | None) -> None:
    weight = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    keep = pattern.keep(weight.abs())
    assert look(weight * keep).pattern == expected
    # A dead column breaks no pattern; a single weight too many does.
    one_more = (weight * keep).index_fill(1, torch.tensor(5), 0.0)
    if expected:
        assert look(one_more).pattern == expected
        one_more[0] = 1.0
        assert look(one_more).pattern is None


def test_empty_layers() -> None:
    found = look(torch.zeros(8, 8), torch.zeros(8, 8))
    assert found.sparsity == 1
    assert found.pattern is None
    assert sum(found.after.histogram) == 0


KINDS = {
    "llama": ["q", "k", "v", "o", "gate", "up", "down"],
    "opt": ["q", "k", "v", "o", "up", "down"],
    "gpt2": ["c_attn", "o", "up", "down"],
    "phi3": ["qkv_proj", "o", "gate_up_proj", "down"],
    "gpt_neox": ["query_key_value", "o", "up", "down"],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_model(name: str, tmp_path: Path) -> None:
    """What `inspect` finds is what the run recorded and what the files hold."""
    source = save(tmp_path / "source", name, shard_size="30KB")
    report = prune(source, output=tmp_path / "out", calibration=tokens(), method="wanda", pattern="70%")
    found = inspect(tmp_path / "out", against=source)
    assert [layer.name for layer in found.layers] == [layer.name for layer in report.layers]
    assert [layer.sparsity for layer in found.layers] == [layer.sparsity for layer in report.layers]
    assert found.sparsity == pytest.approx(report.sparsity, rel=1e-12)
    assert list(found.kinds) == KINDS[name]
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for layer in found.layers:
        assert layer.rows.least == pytest.approx(layer.rows.most)  # Wanda prunes every row alike
        assert layer.before is not None
        assert sum(layer.before.histogram) == layer.weights
        assert sum(layer.after.histogram) == round(layer.weights * (1 - layer.sparsity))
        keys = [key for key in before if key.endswith(f"{layer.name.partition('.')[2]}.weight")]
        size, zero = before[keys[0]].abs().flatten(), after[keys[0]].flatten() == 0
        largest = [size.topk(round(share * len(size))).indices for share in (0.01, 0.1)]
        kept = [1 - zero[indices].double().mean().item() for indices in largest]
        assert layer.largest_kept == pytest.approx(tuple(kept))
    dense = inspect(source)
    assert dense.sparsity == 0
    assert all(layer.largest_kept is None for layer in dense.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compressed_model_is_the_same(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, torch.bfloat16)
    prune(source, output=tmp_path / "out", method="magnitude", pattern="75%")
    compress(tmp_path / "out", tmp_path / "small")
    assert any(tensor.dtype == torch.uint8 for tensor in tensors_of(tmp_path / "small").values())
    whole, small = inspect(tmp_path / "out", against=source), inspect(tmp_path / "small", against=source)
    assert small.layers == whole.layers


def test_bits_of_a_rounded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked for, of the rounded folder and of the compressed one alike."""
    source = save(tmp_path / "source", "llama", torch.bfloat16)
    prune(
        source,
        output=tmp_path / "out",
        method="magnitude",
        allocation={"*.down_proj": "50%", "*.up_proj": "0%"},
        values="int4:group=32",
        embedding="int8:group=128",
    )
    compress(tmp_path / "out", tmp_path / "small")
    for folder in ("out", "small"):
        found = inspect(tmp_path / folder)
        of_kinds = {kind: {layer.values for layer in layers} for kind, layers in found.kinds.items()}
        assert of_kinds["down"] == of_kinds["up"] == {Values(4, 32)}
        assert of_kinds["q"] == {None}
        assert set(found.tables.values()) == {Values(8, 128)}
        print_tables(found)
        out = capsys.readouterr().out
        assert "int4/32" in out
        assert "as stored" in out
        assert "embed_tokens.weight: int8, whole grid, a scale for every 128 inputs" in out
    plain = inspect(source)
    assert not plain.tables
    print_tables(plain)
    assert "as stored" not in capsys.readouterr().out


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "source", "llama")
    prune(source, output=tmp_path / "out", method="magnitude", pattern="2:4")
    print_tables(inspect(tmp_path / "out", against=source, output=tmp_path / "pictures"))
    out = capsys.readouterr().out
    assert all(f"model.layers.{block}.mlp.down_proj" in out for block in range(3))
    assert all(word in out for word in ("50.0%", "2:4", "top 10% kept", "50.00% zeros in 21 layers"))
    assert_pictures(
        list((tmp_path / "pictures").iterdir()),
        {
            "sparsity": ["50.0% zeros", "gate", "block"],
            "structure": ["dead rows", "dead columns", "q"],
            "distribution": ["before", "after", "down"],
            "largest": ["kept of the largest 1%", "kept of the largest 10%", "v"],
        },
    )
    print_tables(inspect(source))
    assert "top 10% kept" not in capsys.readouterr().out


def test_experts_of_a_block_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the data they are one by one; a block may have none."""
    layers = [inspect_layer("model.layers.0.mlp.down_proj", "down", torch.ones(8, 8), None)]
    for expert in range(4):
        weight = torch.ones(8, 8)
        weight[:, : 2 * expert] = 0
        layers.append(inspect_layer(f"model.layers.1.mlp.experts.{expert}.down_proj", "down", weight, None))
    inspection = Inspection("some-model", layers)
    assert {kind: len(of) for kind, of in inspection.kinds.items()} == {"down": 1, "experts' down": 4}
    assert list(inspection.lines) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.experts.*.down_proj",
    ]
    print_tables(inspection)
    line = next(line for line in capsys.readouterr().out.splitlines() if "experts.*.down_proj" in line)
    assert all(word in line for word in ("37.5%", "0% to 75%", "0% to 100%", "12"))  # 0, 2, 4 and 6 of 8
    files = draw(inspection, tmp_path)
    assert_pictures(files, {"sparsity": ["37.5%", "down"], "structure": ["down"], "distribution": ["down"]})
    assert "nan" not in (tmp_path / "sparsity.svg").read_text()


def test_mistakes(tmp_path: Path) -> None:
    source, other = save(tmp_path / "source", "llama"), save(tmp_path / "other", "llama")
    save(tmp_path / "opt", "opt")
    (tmp_path / "file").write_text("some notes")
    for place in (tmp_path / "file", tmp_path / "file" / "pictures"):
        with pytest.raises(ValueError, match=r"pictures cannot be put into '.*file.*': give another folder"):
            inspect(source, output=place)
    with pytest.raises(ValueError, match="compare with the model that it was pruned from"):
        inspect(source, against=tmp_path / "opt")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(
        ValueError, match=r"mlp.gate_proj.weight' has shape \(80, 48\) in .* asks for \(96, 48\)"
    ):
        inspect(other)
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="quantised weights"):
        inspect(other)
    (other / "config.json").write_text(json.dumps(config))
    weights = tensors_of(other)
    del weights["model.layers.1.mlp.up_proj.weight"]
    rewrite(other, weights)
    with pytest.raises(ValueError, match=r"holds no tensor 'model.layers.1.mlp.up_proj.weight'"):
        inspect(other)
    with pytest.raises(ValueError, match="no model folder"):
        inspect(tmp_path / "missing")
