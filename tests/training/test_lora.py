"""LoRA on a pruned model: what is trained is what is saved, and nothing is added to zeros."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_callback import lora, losses_of, trainer
from test_masks import linears, pruned
from test_omission import loss_of, silence, some_units
from torch import nn
from torch.nn import functional
from torch.optim import AdamW

from families import tokens
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.masks import KeepZeros, Masks
from secateurs.training.omission import Omission


def masked(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Masks]:
    """A pruned model with adapters that do something, and the masks that these are under."""
    torch.manual_seed(0)
    model = lora(pruned(name, dtype), **settings)
    masks = Masks.of_zeros(model)
    masks.mask_lora()
    return model, masks


@pytest.mark.parametrize(("name", "layer"), [("llama", "mlp.up_proj"), ("gpt2", "attn.c_attn")])
def test_a_layer_and_its_gradients_are_those_of_its_formula(name: str, layer: str) -> None:
    model, _ = masked(name)
    found = next(module for path, module in model.named_modules() if path.endswith(layer))
    weight = found.base_layer.weight.detach()
    near, far = found.lora_A["default"].weight, found.lora_B["default"].weight
    if name == "gpt2":  # a Conv1D, (in, out)
        weight = weight.T
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, weight.shape[1], dtype=torch.float64, generator=generator, requires_grad=True)
    wanted = torch.randn(2, 5, weight.shape[0], dtype=torch.float64, generator=generator)

    def results(output: torch.Tensor) -> list[torch.Tensor]:
        return [output, *torch.autograd.grad((output * wanted).sum(), [x, near, far])]

    delta = (weight != 0) * (far @ near) * found.scaling["default"]
    plain = functional.linear(x, weight + delta, found.base_layer.bias)
    for one, other in zip(results(found(x)), results(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("omitting", [False, True])
@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "phi3"])
def test_what_is_trained_is_what_is_merged(name: str, omitting: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = pruned(name, torch.float64)
    zeros = {path: weight == 0 for path, weight in linears(plain).items()}
    model = lora(plain)
    sparse = [SparsityAcceleratedTraining(0.5)] if omitting else []
    run = trainer(model, tmp_path, KeepZeros(), *sparse, batches=4)
    run.train()
    losses = losses_of(run)
    assert losses[4] < losses[1]
    model.eval()
    before = loss_of(model)
    merged = model.merge_and_unload()  # PEFT's own
    torch.testing.assert_close(loss_of(merged), before, rtol=1e-10, atol=0)
    for path, weight in linears(merged).items():
        assert torch.equal(weight == 0, zeros[path])


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_on_some_neurons_it_is_the_whole_model_with_the_others_silenced(name: str, in_place: bool) -> None:
    model, _ = masked(name)
    whole = deepcopy(model)
    omission = Omission(model, in_place=in_place)
    kept = some_units(omission)
    omission.choose(kept)
    omission.engage()
    loss = loss_of(model)
    loss.backward()
    omission.disengage()
    silence(whole.get_base_model(), kept)
    expected = loss_of(whole)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for path, parameter in whole.named_parameters():
        if parameter.requires_grad:
            found = model.get_parameter(path).grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-12, msg=path)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_trainers_own_ways_of_training(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora(pruned("llama"), lora_dropout=0.1, bias="lora_only")
    run = trainer(model, tmp_path, KeepZeros(), **settings)
    run.train()
    losses = losses_of(run)
    assert losses[10] < losses[1]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        torch.manual_seed(0)
        model = lora(pruned("llama"))
        return trainer(model, tmp_path, KeepZeros(), save_strategy="steps", save_steps=5, **settings)

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert losses_of(resumed) == losses_of(whole)


def test_its_files_are_plain_lora(tmp_path: Path) -> None:
    model, _ = masked("llama")
    model.save_pretrained(tmp_path / "masked")
    torch.manual_seed(0)
    plain = lora(pruned("llama", torch.float64))
    plain.save_pretrained(tmp_path / "plain")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "masked" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = PeftModel.from_pretrained(pruned("llama", torch.float64), tmp_path / "masked")
    Masks.of_zeros(loaded).mask_lora()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_merging_and_taking_back() -> None:
    model, _ = masked("gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(tokens()).logits
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(tokens()).logits, logits, rtol=1e-9, atol=1e-11)
        model.unmerge_adapter()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=1e-9, atol=1e-12)


def test_a_layer_without_zeros_stays_as_it_was() -> None:
    torch.manual_seed(0)
    dense = pruned("llama", torch.float64)
    with torch.no_grad():
        for weight in (block.mlp.up_proj.weight for block in dense.model.layers):
            weight[weight == 0] = 0.01
    model = lora(dense)
    Masks.of_zeros(model).mask_lora()
    variants = {
        path.rpartition(".")[2]: bool(module.lora_variant)
        for path, module in model.named_modules()
        if hasattr(module, "lora_variant")
    }
    assert variants.pop("up_proj") is False
    assert all(variants.values())


def test_other_adapters_cannot_keep_zeros() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    model = get_peft_model(pruned("llama"), config)
    optimizer = AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    with pytest.raises(ValueError, match=r"no plain LoRA .*Dora"):
        Masks.of_zeros(model).attach(optimizer)


def test_no_product_of_the_layers_size_is_kept_for_the_backward_pass() -> None:
    model, _ = masked("llama", torch.float32)
    layer: nn.Module = model.base_model.model.model.layers[0].mlp.up_proj
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(1, 3, 48))
    assert all(tensor.numel() <= 3 * 80 for tensor in saved if tensor.data_ptr() not in own)
