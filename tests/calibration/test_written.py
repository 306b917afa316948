"""What models write themselves, against loops without a cache, the softmax, and the template's own words."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import decoders
import families
from characters import BEGIN, characters
from secateurs.calibration.written import Form, SelfWritten, drawn, form_of, write
from secateurs.text import wants_bos

END = 2
CHATML = (
    "{% for message in messages %}<pad>{{ message['role'][:1] }}:{{ message['content'] }}</s>;{% endfor %}"
    "{% if add_generation_prompt %}<pad>a:{% endif %}"
)
LENGTH = 24


def naive(model: PreTrainedModel, never: frozenset[int], length: int) -> list[int]:
    """Always the likeliest token, the whole text read again for each; after an end comes a beginning."""
    ids = [BEGIN]
    while len(ids) < length:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        likeliest = [token for token in logits.argsort(descending=True).tolist() if token not in never]
        ids.append(BEGIN if ids[-1] == END else likeliest[0])
    return ids


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "opt", "qwen3_vl", "mamba2", "lfm2", "qwen3_next", "falcon_h1"]
)
def test_cold_it_is_the_likeliest_text(name: str) -> None:
    model = decoders.build(name)
    form = form_of(characters(), model.config)
    tokens = write(model, form, [False, False], length=LENGTH, seed=0, temperature=1e-6)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [naive(model, form.never, LENGTH)] * 2


def llama() -> PreTrainedModel:
    return families.build("llama")


def test_a_token_is_drawn_as_often_as_it_is_likely() -> None:
    """Of all tokens, not of the likeliest fifty, whatever the model's own settings say."""
    model = llama()
    assert model.generation_config is not None
    model.generation_config.update(top_k=1, repetition_penalty=2.0, max_new_tokens=3)
    for temperature in (1.0, 0.5):
        rows = 4096
        tokens = write(model, plain_form(), [False] * rows, length=2, seed=0, temperature=temperature)
        with torch.no_grad():
            likely = (model(torch.tensor([[BEGIN]])).logits[0, -1] / temperature).softmax(-1)
        counts = torch.bincount(tokens[:, 1], minlength=len(likely))
        # The sum over tokens of (count - expected)^2 / expected has a mean of 127 and a spread of 16.
        assert ((counts - rows * likely).square() / (rows * likely)).sum() < 127 + 5 * 16
    assert model.generation_config.top_k == 1


def plain_form() -> Form:
    return form_of(characters(), llama().config)


def test_every_text_begins_with_its_token() -> None:
    model, form, state = llama(), plain_form(), torch.get_rng_state()
    tokens = write(model, form, [False] * 64, length=LENGTH, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens.shape == (64, LENGTH)
    assert (tokens[:, 0] == BEGIN).all()
    ends = (tokens[:, :-1] == END).nonzero()
    assert len(ends) > 3
    assert (tokens[ends[:, 0], ends[:, 1] + 1] == BEGIN).all()
    assert torch.equal(write(model, form, [False] * 64, length=LENGTH, seed=3), tokens)
    assert not torch.equal(write(model, form, [False] * 64, length=LENGTH, seed=4), tokens)
    assert write(model, form, [False], length=1, seed=0).tolist() == [[BEGIN]]


def test_where_one_token_begins_and_ends_it_stands_once() -> None:
    tokenizer = characters()
    tokenizer.bos_token = tokenizer.eos_token
    form = form_of(tokenizer, llama().config)
    assert form.opening == END
    tokens = write(llama(), form, [False] * 64, length=LENGTH, seed=0)
    assert (tokens[:, 0] == END).all()
    rest = tokens[:, 1:]
    assert 0 < (rest == END).float().mean() < 0.05  # one in 128 or so: none is forced


def talkative(template: str = CHATML) -> Any:
    tokenizer = characters()
    tokenizer.chat_template = template
    return tokenizer


def shown(row: Tensor) -> str:
    """One character for each token."""
    return "".join({0: "[", BEGIN: "^", END: "]"}.get(token, chr(token)) for token in row.tolist())


def written(tokenizer: Any, length: int) -> list[str]:
    """Conversations, without the characters that stand for special tokens here."""
    form = form_of(tokenizer, llama().config)
    form = replace(form, never=frozenset(map(ord, "[]^")))
    return [shown(row) for row in write(llama(), form, [True] * 32, length=length, seed=0)]


def test_both_sides_of_a_conversation_are_written() -> None:
    sizes = []
    for text in written(talkative(), 96):
        turns = text.split("]")
        for number, turn in enumerate(turns):
            start = "[u:" if number == 0 else ";[a:" if number % 2 else ";[u:"
            if number < len(turns) - 1:
                assert turn.startswith(start), text
                sizes.append(len(turn) - len(start))
            else:  # cut off where the sequence is full
                assert turn.startswith(start) or start.startswith(turn), text
    assert max(sizes) == 96 // 4  # there the other side had to speak
    assert sum(size < 96 // 4 for size in sizes) > 3  # those ended by themselves


def test_after_a_conversation_comes_another() -> None:
    """Messages end with <pad> here, so that the end of the text is the end of the conversation."""
    template = (
        "^{% for message in messages %}{{ message['role'][:1] }}:{{ message['content'] }}<pad>{% endfor %}"
    )
    texts = written(talkative(template.replace("^", "<s>")), 64)
    ends = [rest for text in texts for rest in text.split("]")[1:]]
    assert len(ends) > 3
    assert all(rest.startswith("^u:") or "^u:".startswith(rest) for rest in ends)


def test_models_without_a_beginning() -> None:
    tokenizer = talkative()
    tokenizer.bos_token = tokenizer.eos_token = None
    config = families.build("llama").config
    config.bos_token_id = config.eos_token_id = None
    form = form_of(tokenizer, config)
    assert (form.opening, form.talking(5)) == (None, 5)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no token of beginning or end and no chat template; give a text"):
        form_of(tokenizer, config)


def test_half_is_conversations_where_there_is_a_template() -> None:
    config = llama().config
    assert form_of(characters(), config).talking(7) == 0
    assert form_of(talkative(), config).talking(7) == 3
    refusing = talkative("{{ raise_exception('nobody may speak') }}")
    assert form_of(refusing, config).turns is None


def test_a_beginning_that_is_asked_for_stands_before_a_conversation() -> None:
    form = form_of(talkative(), llama().config, bos=True)
    assert form.turns is not None
    assert form.turns.head[0] == form.opening == BEGIN
    assert wants_bos("gemma3")


def test_tokens_of_images_are_never_written() -> None:
    model = decoders.build("qwen3_vl")
    form = form_of(characters(), model.config)
    assert form.never == set(decoders.IMAGE_TOKENS.values())
    tokens = write(model, form, [False] * 128, length=LENGTH, seed=0)
    assert not form.never & set(tokens.flatten().tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite(value: float) -> None:
    model = llama()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = value
    with pytest.raises(FloatingPointError, match="NaN or Inf after 1 tokens of its own"):
        write(model, plain_form(), [False], length=LENGTH, seed=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        SelfWritten(temperature)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-24])
def test_only_what_has_a_share_is_drawn(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number is drawn, at both ends too."""
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, number))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 999, generator=generator)
    scores[:, [0, 1, 500, 997, 998]] = -torch.inf
    shares = scores.softmax(dim=-1)
    chosen = drawn(shares)
    assert (shares.gather(1, chosen[:, None]) > 0).all()
    up_to = shares.double().cumsum(dim=-1).gather(1, chosen[:, None])[:, 0]
    assert ((up_to - number).abs() <= shares.max() + 1e-5).all()
