"""Logits of labelled positions, a few at a time: loss and gradients are the model's own, family by family."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_callback import lora, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, MixtralConfig, PreTrainedModel

from families import FAMILIES, build, tokens
from secateurs.training import head
from secateurs.training.data import ChatData, Lesson
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
OTHERS: dict[str, Any] = {
    "scaled": CohereConfig(**_SMALL, logit_scale=0.3),
    "divided": GraniteConfig(**_SMALL, logits_scaling=3.0),
    "routers": MixtralConfig(**_SMALL, num_local_experts=4, output_router_logits=True),
}
LABELS = 7 + 5 + 2
WHOLE = ("gemma2", "scaled", "divided")
"""What changes its logits before the loss."""


def batch() -> dict[str, Tensor]:
    """Answers of different lengths, one conversation padded; LABELS labels in all."""
    ids = tokens(3, 16)
    labels = ids.clone()
    labels[0, :9], labels[1, :2], labels[1, 7:], labels[2, :14] = -100, -100, -100, -100
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor], Any]:
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    output = model(**inputs)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output.loss.detach(), gradients, output


def compare(model: nn.Module, *, width: int, rows: int = LABELS, **more: Any) -> None:
    """See that nothing but the logits differs."""
    inputs = {**batch(), **more}
    model.train()
    loss, gradients, _ = loss_and_gradients(model, inputs)
    with logits_where_labels(model) as does:
        assert does
        assert model.training
        found, others, output = loss_and_gradients(model, inputs)
        assert output.logits.shape == (1, rows, width)
        assert model(input_ids=tokens()).logits.shape == (2, 24, 128)
        model.eval()
        assert model(**inputs).logits.shape == (3, 16, 128)
        model.train()
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert len(gradients) == len(others)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert model(**inputs).logits.shape == (3, 16, 128)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_loss_and_gradients_are_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)  # so that there are several
    torch.manual_seed(0)
    model = build(name) if name in FAMILIES else AutoModelForCausalLM.from_config(OTHERS[name])
    compare(model, width=128 if name in WHOLE else 0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_calls_of_other_kinds(name: str) -> None:
    model, width = build(name), 128 if name in WHOLE else 0
    compare(model, width=width, num_items_in_batch=torch.tensor(40))  # of accumulated batches
    compare(model, width=width, rows=3 * 15, labels=batch()["input_ids"])
    compare(
        model, width=width, rows=3 * 8, shift_labels=tokens(3, 16).index_fill(1, torch.arange(0, 16, 2), -100)
    )


def test_without_any_label_it_is_the_models_own_loss() -> None:
    model = build("llama").train()
    inputs = {**batch(), "labels": torch.full((3, 16), -100), "num_items_in_batch": torch.tensor(5)}
    with logits_where_labels(model):
        loss, gradients, output = loss_and_gradients(model, inputs)
    assert loss == 0
    assert output.logits.shape == (3, 16, 128)
    assert all((gradient == 0).all() for gradient in gradients)


def test_other_dtypes_and_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(build("llama", torch.float64), width=128)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    compare(build("llama"), width=128)


def test_under_autocast() -> None:
    model = build("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients, _ = loss_and_gradients(model, batch())
        with logits_where_labels(model) as does:
            assert does
            found, others, output = loss_and_gradients(model, batch())
    assert output.logits.shape == (1, LABELS, 128)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).norm() <= 2**-7 * one.norm()  # the rounding of bfloat16


def test_with_lora_and_sparse_steps() -> None:
    torch.manual_seed(0)
    model = lora(build("llama"))
    compare(model, width=0)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    SparseTraining(0.5, schedule="constant", importance="magnitude").attach(model, optimizer, total_steps=1)
    compare(model, width=0)


def test_a_model_with_another_loss_keeps_it() -> None:
    model: PreTrainedModel = build("llama").train()

    def loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return logits.square().mean()

    model.loss_function = loss
    own = model(**batch()).loss
    with logits_where_labels(model) as does:
        assert not does
        assert model(**batch()).loss == own
    assert model.loss_function is loss


def test_a_head_whose_product_is_changed_on_the_way_keeps_the_models_own_loss() -> None:
    model = build("llama").train()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.mul_(2))
    own, gradients, _ = loss_and_gradients(model, batch())
    with logits_where_labels(model) as does:
        assert not does
        found, others, output = loss_and_gradients(model, batch())
    assert output.logits.shape == (3, 16, 128)
    assert found == own
    assert all(map(torch.equal, gradients, others))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_run_on_conversations_has_the_losses_of_trls_own(name: str, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    rows = [
        {"input_ids": row.tolist(), "assistant_masks": [0] * (5 + i % 7) + [1] * (19 - i % 7)}
        for i, row in enumerate(tokens(8))
    ]

    def arguments() -> Any:
        return trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        )

    def losses(run: Any) -> list[float]:
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    whole = trl.SFTTrainer(
        build(name), arguments(), train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    data = ChatData([], None, 64)
    data.lessons["train"] = [
        Lesson(
            numpy.array(row["input_ids"], dtype=numpy.int32), numpy.array(row["assistant_masks"], dtype=bool)
        )
        for row in rows
    ]
    model = build(name)
    with logits_where_labels(model) as does:
        assert does
        ours = losses(data.trainer(model=model, args=arguments(), processing_class=tokenizer()))
    assert len(ours) == 2
    assert ours == pytest.approx(losses(whole), rel=1e-4)
