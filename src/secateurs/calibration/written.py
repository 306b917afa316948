"""Text that a model writes itself: calibration needs none from outside, and forgets nothing that it knows.

Plain sampling from the model's own distribution (arXiv 2410.17170 calibrates on such text). Every sequence
begins with one token and is as long as all others, so that nothing is padded, which models with a state
instead of keys and values could not ignore. What a sequence is not free in (a template's words between two
speakers, the token that opens the next document) is forced when it is due.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateurs.attention import token_by_token
from secateurs.text.conversations import Conversation, apply_template
from secateurs.text.tokenising import ids_of
from secateurs.text.tokens import bos_id

LONGEST = 4
"""The share of a sequence, one in so many, after which a message ends that does not end by itself."""

SPEAKERS = ("xquser1x", "xqanswer1x", "xquser2x", "xqanswer2x")
"""Messages that no template says by itself."""


@dataclass(frozen=True)
class SelfWritten:
    """The model that is to be pruned as a source of text, by the name `self`.

    Args:
        temperature: divides the logits; at 1 the model's own distribution is sampled.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature of self-written text is above 0, not {self.temperature}")


class Turns(NamedTuple):
    """What a chat template says around messages, as tokens."""

    head: list[int]
    """Before the user's first words."""
    between: tuple[list[int], list[int]]
    """From the end of the user's words to the assistant's first, and from the end of these to the user's."""
    closing: frozenset[int]
    """Tokens by which a message ends."""


@dataclass(frozen=True)
class Form:
    """How the sequences of a model begin and go on."""

    opening: int | None
    """Begins a text; None if the model has no such token, and only holds conversations."""
    ends: frozenset[int]
    """Each of these tokens ends a text."""
    turns: Turns | None
    """None without a chat template."""
    never: frozenset[int]
    """Tokens that stand for images and sound."""

    @property
    def forced(self) -> list[int]:
        """All tokens that are written whatever the model predicts."""
        words = (
            [] if self.turns is None else [*self.turns.head, *self.turns.between[0], *self.turns.between[1]]
        )
        return words if self.opening is None else [self.opening, *words]

    def talking(self, sequences: int) -> int:
        """How many of so many are conversations: half of them, where there is a choice."""
        if self.turns is None:
            return 0
        return sequences if self.opening is None else sequences // 2


def form_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, bos: bool = False) -> Form:
    """What a model's self-written sequences begin with and consist of.

    Args:
        tokenizer: its tokens of beginning and end come first; those that only the configuration names count
            if the tokenizer knows them as special.
        config: of the model.
        bos: whether every sequence has to begin with the tokenizer's beginning-of-text token.

    Raises:
        ValueError: there is neither a token that texts begin or end with nor a chat template; or none to
            begin with, where it is asked for.
    """
    begin = [bos_id(tokenizer)] if bos else []
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    parts = (config.get_text_config(decoder=True), config)
    firsts, ends = (_ids(getattr(tokenizer, f"{name}_token_id", None)) for name in ("bos", "eos"))
    for part in parts:
        firsts += [id for id in _ids(getattr(part, "bos_token_id", None)) if id in special]
        ends += [id for id in _ids(getattr(part, "eos_token_id", None)) if id in special]
    opening = next(iter([*firsts, *ends]), None)
    turns = _turns_of(tokenizer, begin, frozenset(special | set(ends)))
    if opening is None and turns is None:
        raise ValueError(
            "the model cannot write its own text: its tokenizer has no token of beginning or end and no chat "
            "template; give a text instead of 'self'"
        )
    never = {
        id
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and not name.startswith(("bos_", "eos_", "pad_"))
        for id in _ids(value)
    }
    return Form(opening, frozenset(ends), turns, frozenset(never - {opening} - set(ends)))


def _ids(value: Any) -> list[int]:
    return [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int) and id >= 0]


def _turns_of(tokenizer: PreTrainedTokenizerBase, begin: list[int], special: frozenset[int]) -> Turns | None:
    """None if there is no template, or it does not let a user and an assistant speak in turn."""
    if not tokenizer.chat_template:
        return None
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, SPEAKERS, strict=True)]
    try:
        text: str = apply_template(Conversation(messages), tokenizer)
    except ValueError:
        return None
    parts = re.split("|".join(SPEAKERS), text)
    if re.findall("|".join(SPEAKERS), text) != list(SPEAKERS):
        return None
    head, ask, back = (ids_of(part, tokenizer, rendered=True) if part else [] for part in parts[:3])
    if head[: len(begin)] != begin:
        head = begin + head
    if not (head and ask and back):
        return None
    closing = (next((id for id in between if id in special), None) for between in (ask, back))
    return Turns(head, (ask, back), frozenset(id for id in closing if id is not None))


class _Sequence:
    """One sequence as it grows: texts one after another, or conversations.

    Args:
        form: of the model's sequences.
        talks: whether it is made of conversations.
        most: tokens in a message.
    """

    def __init__(self, form: Form, *, talks: bool, most: int) -> None:
        self.form, self.turns, self.most = form, form.turns if talks else None, most
        if self.turns is not None:
            self.begin = self.turns.head
        else:
            assert form.opening is not None
            self.begin = [form.opening]
        self.speaker, self.said = 0, 0
        self.pending = deque(self.begin)
        self.forced = True

    def due(self, last: int) -> int | None:
        """The token that has to come next, or None where the model is free.

        Args:
            last: the token before it.
        """
        if not self.pending and not self.forced:
            self.pending.extend(self._after(last))
        self.forced = bool(self.pending)
        return self.pending.popleft() if self.pending else None

    def _after(self, token: int) -> list[int]:
        """What follows a token that the model has chosen, before it may choose again."""
        if self.turns is None:
            return self.begin if token in self.form.ends and [token] != self.begin else []
        self.said += 1
        between = self.turns.between[self.speaker]
        if token in self.turns.closing and token in between:
            rest = between[between.index(token) + 1 :]
        elif token in self.form.ends:
            self.speaker, self.said = 0, 0
            return self.begin
        elif self.said >= self.most:
            rest = between
        else:
            return []
        self.speaker, self.said = 1 - self.speaker, 0
        return rest


class _Choosing(LogitsProcessor):
    """Leaves each sequence one token: that which is due, or else one that is drawn."""

    def __init__(
        self,
        sequences: list[_Sequence],
        never: frozenset[int],
        temperature: float,
        advance: Callable[[int], None] | None,
    ) -> None:
        self.sequences, self.never, self.temperature = sequences, sorted(never), temperature
        self.advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (rows, tokens so far), (rows, tokens)
        # Whole rows only: where a vocabulary is padded, logits may be -inf on purpose.
        if scores.isnan().any() or not scores.amax(dim=-1).isfinite().all():
            raise FloatingPointError(
                f"the model's predictions are NaN or Inf after {input_ids.shape[1]} tokens of its own: it "
                "cannot write calibration text"
            )
        scores[:, [id for id in self.never if id < scores.shape[1]]] = -math.inf
        chosen = drawn((scores.float() / self.temperature).softmax(dim=-1)).tolist()
        scores.fill_(-math.inf)
        for row, (sequence, last) in enumerate(zip(self.sequences, input_ids[:, -1].tolist(), strict=True)):
            due = sequence.due(last)
            scores[row, chosen[row] if due is None else due] = 0.0
        if self.advance:
            self.advance(len(scores))
        return scores


def drawn(shares: Tensor) -> Tensor:
    """A token for each sequence.

    `multinomial` draws a number for each token of the vocabulary, which on a processor takes long beside a
    small model's products. There a single one says up to where shares are to be added.

    Args:
        shares: of the tokens, (sequences, vocabulary), float32.

    Returns:
        (sequences,) int64. No token without a share is among them.
    """
    if not shares.is_cpu:
        return shares.multinomial(1)[:, 0]
    up_to = shares.cumsum(dim=-1)
    total = up_to[:, -1:]
    # Rounding could make it the total, which no sum is above.
    number = (torch.rand(len(shares), 1) * total).minimum(total.nextafter(torch.zeros(())))
    return torch.searchsorted(up_to, number, right=True)[:, 0]


def write(
    model: PreTrainedModel,
    form: Form,
    talks: Sequence[bool],
    *,
    length: int,
    seed: int,
    temperature: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Sequences that a model writes, all at once.

    Global random state is not touched. The same seed gives the same on the same device with the same threads.

    Args:
        model: in evaluation mode; runs where it is, with the cache that it makes itself.
        form: see `form_of`.
        talks: for each sequence whether it is a conversation, in which the model speaks for both sides. One
            that ends is followed by another, as a text is.
        length: tokens in each.
        seed: of sampling.
        temperature: of sampling.
        advance: told of new tokens.

    Returns:
        (sequences, length) int64 token ids on the CPU.

    Raises:
        FloatingPointError: the model's predictions are not finite.
        ValueError: transformers cannot generate with this model.
    """
    sequences = [_Sequence(form, talks=each, most=max(1, length // LONGEST)) for each in talks]
    first = torch.tensor([[sequence.pending.popleft()] for sequence in sequences])
    if length == 1:
        return first
    plain = GenerationConfig(do_sample=False, max_new_tokens=length - 1, pad_token_id=0)
    choosing = _Choosing(sequences, form.never, temperature, advance)
    generator: Any = model
    before, devices = generator.generation_config, [model.device] if model.device.type == "cuda" else []
    # What a model's own settings say of sampling would be taken for what is left open here.
    generator.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), token_by_token(length):
            torch.manual_seed(seed)
            tokens: Tensor = generator.generate(
                first.to(model.device),
                attention_mask=torch.ones_like(first, device=model.device),
                generation_config=plain,
                logits_processor=LogitsProcessorList([choosing]),
            )
    except (FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever kind the model's code stumbles into
        reason = (" ".join(str(error).split()) or type(error).__name__)[:160]
        raise ValueError(
            f"transformers cannot generate with this model ({reason}): give a text instead of 'self'"
        ) from error
    finally:
        generator.generation_config = before
    return tokens.cpu()
