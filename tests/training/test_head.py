"""Logits only where there are labels: loss and gradients against the model's own, family by family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_callback import lora, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, MixtralConfig, PreTrainedModel

from families import FAMILIES, build, tokens
from secateurs.training.head import logits_where_labels
from secateurs.training.sparse import SparseTraining

_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = [
    CohereConfig(**_SMALL, logit_scale=0.3),
    GraniteConfig(**_SMALL, logits_scaling=3.0),
    MixtralConfig(**_SMALL, num_local_experts=4, output_router_logits=True),
]


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Answers of different lengths, one conversation padded."""
    ids = tokens(3, 16, seed=seed)
    labels = ids.clone()
    labels[0, :9], labels[1, :2], labels[1, 7:], labels[2, :14] = -100, -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(model: nn.Module, **more: Any) -> tuple[Tensor, list[Tensor], Any]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    output = model(**batch(), **more)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output.loss.detach(), gradients, output


def compare(model: nn.Module, *, applies: bool = True, **more: Any) -> None:
    model.train()
    loss, gradients, _ = loss_and_gradients(model, **more)
    with logits_where_labels(model) as does:
        assert does == applies
        assert model.training
        found, others, output = loss_and_gradients(model, **more)
        if applies:
            assert output.logits.shape[:2] == (1, 7 + 5 + 2)
        model.eval()
        assert model(**batch()).logits.shape[:2] == (3, 16)
        model.train()
        assert model(input_ids=tokens()).logits.shape[:2] == (2, 24)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert model(**batch()).logits.shape[:2] == (3, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_models_own(name: str) -> None:
    # OPT's code calls the inside of its backbone, so it is left alone.
    compare(build(name), applies=not name.startswith("opt"))


@pytest.mark.parametrize("config", SCALED, ids=lambda config: str(config.model_type))
def test_scaled_logits_and_the_loss_of_routers(config: Any) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    compare(model)


def test_the_mean_is_that_of_all_accumulated_batches() -> None:
    compare(build("gemma2"), num_items_in_batch=torch.tensor(40))


def test_with_lora_and_sparse_steps() -> None:
    torch.manual_seed(0)
    model = lora(build("llama"))
    compare(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    SparseTraining(0.5, schedule="constant", importance="magnitude").attach(model, optimizer, total_steps=1)
    compare(model)


def test_trl_counts_the_same_loss(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    def losses(picking: bool) -> list[float]:
        model = build("gemma2")
        rows = [
            {"input_ids": row.tolist(), "labels": [-100] * (5 + i % 7) + row.tolist()[5 + i % 7 :]}
            for i, row in enumerate(tokens(8))
        ]
        config = trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        )
        run = trl.SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        if picking:
            with logits_where_labels(model) as does:
                assert does
                run.train()
        else:
            run.train()
        history = run.state.log_history
        return [
            entry[key]
            for entry in history
            if "loss" in entry
            for key in ("loss", "mean_token_accuracy", "entropy")
        ]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
