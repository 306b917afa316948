"""A pruned model's zeros stay zero through training, whatever else happens to its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_callback import lora, trainer
from test_frozen import OPTIMIZERS
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from families import build, tokens
from secateurs.anatomy import anatomy_of
from secateurs.training import sparse
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.masks import KeepZeros, Masks
from secateurs.training.omission import Omission
from secateurs.training.sparse import SparseTraining


def pruned(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Without the smaller half of each linear layer's weights."""
    model = build(name, dtype)
    with torch.no_grad():
        for weight in linears(model).values():
            weight[weight.abs() < weight.abs().median()] = 0
    return model


def linears(model: nn.Module) -> dict[str, Tensor]:
    path = anatomy_of(model.config).path
    return {
        f"{path}.{name}.weight": layer.weight.detach()
        for name, layer in model.get_submodule(path).named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, sat: Any = None) -> None:
    model.train()
    for step in range(steps):
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        if sat is not None:
            sat.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("omitting", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_stay_and_the_rest_trains(optimizer: str, omitting: bool) -> None:
    model = pruned("llama")
    made = OPTIMIZERS[optimizer](model.parameters())
    before = {name: weight.clone() for name, weight in linears(model).items()}
    masks = Masks.of_zeros(model)
    masks.attach(made)
    sat = SparseTraining(0.5, probe_every=2) if omitting else None
    if sat is not None:
        sat.attach(model, made, total_steps=10)
    train(model, made, 6, sat)
    if sat is not None:
        sat.detach()
    for name, weight in linears(model).items():
        assert torch.equal(weight == 0, before[name] == 0), name
        assert not torch.equal(weight, before[name])
    masks.detach()
    train(model, made, 1)
    assert all((weight == 0).sum() < (before[name] == 0).sum() for name, weight in linears(model).items())


def test_gradients_of_held_weights_are_zero_for_clipping_to_see() -> None:
    model = pruned("gpt2")
    Masks.of_zeros(model).attach(AdamW(model.parameters()))
    model.train()
    for _ in range(2):  # accumulated
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for layer in [module for module in model.transformer.h.modules() if hasattr(module, "nf")]:
        assert layer.weight.grad.count_nonzero() > 0
        assert not (layer.weight.grad * (layer.weight == 0)).any()


@pytest.mark.parametrize("omitting", [False, True])
def test_masks_may_be_replaced_between_steps(omitting: bool) -> None:
    model = build("llama")
    made = AdamW(model.parameters(), lr=1e-2)
    sat = SparseTraining(0.5, schedule="constant", importance="uniform") if omitting else None
    if sat is not None:
        sat.attach(model, made, total_steps=4)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    top, bottom = torch.ones(80, 48), torch.ones(80, 48)
    top[:40], bottom[40:] = 0, 0
    masks = Masks(model, {name: top})
    masks.attach(made)
    assert not weight[:40].any()
    train(model, made, 2, sat)
    model.eval()(tokens())  # whole
    assert not weight[:40].any()
    masks.set({name: bottom})
    assert not weight.any()  # what was held is still zero, what is held now became so
    train(model, made, 2, sat)
    masks.set({name: bottom})
    grown = weight[:40].all(dim=1)
    assert grown.all() or (omitting and grown.any())
    assert not weight[40:].any()


@pytest.mark.parametrize("in_place", [True, False])
def test_held_and_omitted_at_once_equals_each_by_itself(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the mask holds a whole neuron at zero, omitting it changes nothing at all."""
    chosen = in_place
    monkeypatch.setattr(sparse, "Omission", lambda model, in_place: Omission(model, in_place=chosen))
    models = [build("llama", torch.float64) for _ in range(2)]
    for model in models:
        with torch.no_grad():
            for block in model.model.layers:
                block.mlp.up_proj.weight[::2] = 0
                block.mlp.down_proj.weight[:, ::2] = 0
    results = []
    half = SparseTraining(attention_rate=0, mlp_rate=0.5, schedule="constant")
    for model, sat in zip(models, [None, half], strict=True):
        made = AdamW(model.parameters(), lr=1e-2)
        Masks.of_zeros(model).attach(made)
        if sat is not None:
            sat.attach(model, made, total_steps=4)
        train(model, made, 4, sat)
        if sat is not None:
            sat.detach()
        results.append(model.state_dict())
    for name, value in results[0].items():
        if "gate_proj" not in name:
            torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-9, msg=name)


def test_in_trainer_beside_sparse_training(tmp_path: Path) -> None:
    model = pruned("phi3")
    before = {name: weight.clone() for name, weight in linears(model).items()}
    trainer(model, tmp_path, KeepZeros(), SparsityAcceleratedTraining(0.5), optim="adafactor").train()
    for name, weight in linears(model).items():
        assert torch.equal(weight == 0, before[name] == 0)


def test_merging_lora_fills_no_zeros(tmp_path: Path) -> None:
    plain = pruned("llama", torch.float64)
    before = {name: weight.clone() for name, weight in linears(plain).items()}
    torch.manual_seed(0)
    model = lora(plain)
    masks = Masks.of_zeros(model)
    keep = KeepZeros(masks)
    trainer(model, tmp_path, keep, SparsityAcceleratedTraining(0.5)).train()
    merged = masks.merge_lora(model)
    for name, weight in linears(merged).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert not torch.equal(weight, before[name])


def test_masks_must_fit_the_model() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"a mask for 'model\.layers\.9'.*no such parameter"):
        Masks(model, {"model.layers.9": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"mask of 'lm_head.weight' has shape \(3,\), the parameter \(128, 48\)"
    ):
        Masks(model, {"lm_head.weight": torch.ones(3)})
