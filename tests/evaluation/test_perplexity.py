import math

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import families
from secateurs.evaluation import perplexity


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return families.build("llama")  # 64 positions, a vocabulary of 128


def naive(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> float:
    """The definition, a window and a token at a time, in float64 NumPy."""
    windows = []
    with torch.no_grad():
        for start in range(0, len(tokens) - length + 1, length):
            window = tokens[start : start + length]
            scores = model.double()(input_ids=window[None]).logits[0].numpy()
            model.float()
            losses = []
            for position in range(length - 1):
                row = scores[position] - scores[position].max()
                losses.append(numpy.log(numpy.exp(row).sum()) - row[int(window[position + 1])])
            windows.append(sum(losses) / len(losses))
    return math.exp(sum(windows) / len(windows))


@pytest.mark.parametrize("length", [2, 24, 64])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_it_is_the_definition(model: PreTrainedModel, length: int, batch_size: int | None) -> None:
    tokens = families.tokens(1, 150)[0]  # no multiple of 64 or 24: the rest is dropped
    value = perplexity(model, tokens, length=length, batch_size=batch_size)
    assert value == pytest.approx(naive(model, tokens, length), rel=2e-6)


def test_windows_longer_than_a_chunk_are_whole() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=700,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(40, (1400,), generator=torch.Generator().manual_seed(1))
    assert perplexity(model, tokens) == pytest.approx(naive(model, tokens, 700), rel=2e-6)


def test_the_default_window_is_the_models_up_to_2048(model: PreTrainedModel) -> None:
    tokens = families.tokens(1, 200)[0]
    assert perplexity(model, tokens) == perplexity(model, tokens, length=64)
    with pytest.raises(ValueError, match="windows of 65 tokens: from 2 to 64"):
        perplexity(model, tokens, length=65)

    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has 2047 tokens, one window needs 2048"):
        perplexity(LlamaForCausalLM(config), torch.zeros(2047, dtype=torch.int64))


def test_every_family_is_measured() -> None:
    tokens = families.tokens(1, 50)[0]
    for name in families.FAMILIES:
        model = families.build(name)
        assert perplexity(model, tokens, length=24) == pytest.approx(naive(model, tokens, 24), rel=1e-5), name


def test_half_precision_is_summed_in_float32(model: PreTrainedModel) -> None:
    half = families.build("llama", torch.bfloat16)
    tokens = families.tokens(1, 640)[0]
    value = perplexity(half, tokens)
    with torch.no_grad():
        logits = torch.cat([half(input_ids=window[None]).logits for window in tokens.view(-1, 64)])
    exact = -logits.double().log_softmax(-1)[:, :-1].gather(2, tokens.view(-1, 64)[:, 1:, None]).mean()
    assert value == pytest.approx(exact.exp().item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored(training: bool) -> None:
    model = families.build("gpt2").train(training)  # with dropout
    tokens = families.tokens(1, 64)[0]
    assert perplexity(model, tokens) == perplexity(model, tokens)
    assert model.training is training
    with pytest.raises(ValueError, match="one window needs 64"):
        perplexity(model, tokens[:63])
    assert model.training is training


@pytest.mark.parametrize("batch_size", [None, 1])
def test_every_window_can_begin_with_one_token(model: PreTrainedModel, batch_size: int | None) -> None:
    tokens = families.tokens(1, 100)[0]
    begin = torch.tensor([1])
    framed = torch.cat([torch.cat([begin, window]) for window in tokens[:92].view(-1, 23)])
    expected = pytest.approx(naive(model, framed, 24), rel=2e-6)
    assert perplexity(model, tokens, length=24, bos=1, batch_size=batch_size) == expected
    # A tokenizer may have put one at the front.
    assert perplexity(model, torch.cat([begin, tokens]), length=24, bos=1, batch_size=batch_size) == expected


def test_a_token_that_is_not_the_models_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="token 128 is outside of the model's vocabulary of 128"):
        perplexity(model, torch.tensor([5, 128, 5]), length=2)
    with pytest.raises(ValueError, match="token -1 is outside of the model's vocabulary of 128"):
        perplexity(model, torch.tensor([5, -1, 5]), length=2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_window_whose_loss_is_not_finite_is_named(batch_size: int) -> None:
    model = families.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    tokens = families.tokens(1, 50)[0]
    tokens[tokens == 77] = 78
    tokens[33] = 77  # the fourth window of ten
    with pytest.raises(FloatingPointError, match=r"window 3 \(tokens 30 to 39\)"):
        perplexity(model, tokens, length=10, batch_size=batch_size)
