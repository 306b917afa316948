"""Answers against transformers' own `generate`, divergences against float64 arithmetic on its logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from characters import characters
from families import build
from folders import save
from secateurs import prune
from secateurs.evaluation.answers import answers

PROMPTS = ["once", "a b c"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("answers")
    dense = save(folder / "dense", "llama")
    return [dense, prune(dense, output=folder / "pruned", method="magnitude", pattern="50%").output]


def test_they_are_what_transformers_generates_and_diverge_by_kl(models: list[Path]) -> None:
    dense, pruned = map(AutoModelForCausalLM.from_pretrained, models)
    tokenizer = characters()
    for prompt, (one, other) in zip(PROMPTS, answers(models, PROMPTS, 12, "cpu"), strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for model, answer in ((dense, one), (pruned, other)):
            whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert whole[0, ids.shape[1] :].tolist() == list(answer.tokens)
            before, after = (tokenizer.decode(each[0], skip_special_tokens=True) for each in (ids, whole))
            assert before + answer.text == after
            assert len(answer.pieces) == len(answer.tokens)
        whole = torch.cat([ids, torch.tensor([one.tokens])], dim=1)
        with torch.no_grad():
            wanted, given = (model(whole).logits[0].double().softmax(-1) for model in (dense, pruned))
        expected = (wanted * (wanted / given).log()).sum(-1)[ids.shape[1] - 1 : -1]
        assert one.divergence is None
        assert other.divergence == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
        assert other.mean == pytest.approx(expected.mean().item(), rel=1e-3)
        assert other.parts is not None
        assert one.tokens[: other.parts] == other.tokens[: other.parts]
        assert one.tokens[other.parts] != other.tokens[other.parts]


def test_a_model_does_not_part_from_itself(models: list[Path]) -> None:
    [[one, other]] = answers([models[0]] * 2, PROMPTS[:1], 8, "cpu")
    assert one.tokens == other.tokens
    assert other.parts is None
    assert other.divergence == pytest.approx([0] * 8, abs=1e-6)


def test_the_end_of_a_text_is_a_token_that_adds_nothing(tmp_path: Path) -> None:
    model = build("llama")
    ids = characters()("once", return_tensors="pt").input_ids
    second = int(model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)[0, -1])
    model.generation_config.eos_token_id = second
    model.save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    [[answer]] = answers([tmp_path], ["once"], 8, "cpu")
    assert answer.tokens[-1] == second
    assert len(answer.tokens) <= 2


def test_models_of_other_vocabularies_stand_beside_but_are_not_compared(
    models: list[Path], tmp_path: Path
) -> None:
    tokenizer = characters()
    tokenizer.add_tokens(["once"])
    model = build("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    [[_, other]] = answers([models[0], tmp_path], ["a b"], 4, "cpu")
    assert other.divergence is other.parts is None
    with pytest.raises(ValueError, match="different vocabularies") as caught:
        answers([models[0], tmp_path], ["a b"], 4, "cpu", one_vocabulary=True)
    assert "\n" not in str(caught.value)


def test_mistakes_are_found_before_weights_are_read(models: list[Path]) -> None:
    with pytest.raises(ValueError, match="made for 64"):
        answers(models, ["once"], 64, "cpu")
    with pytest.raises(ValueError, match="prompt is empty"):
        answers(models, ["once", ""], 8, "cpu")
