"""What a model is trained on: packed blocks of running text, or conversations of which the answers count."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, default_data_collator

from secateurs.text.conversations import CHAT_TEMPLATE, Conversation, apply_template, render, template_of
from secateurs.text.documents import Piece, Text, is_blank
from secateurs.text.folders import Split
from secateurs.text.hub import PUBLISHED
from secateurs.text.sources import load_conversations, load_text
from secateurs.text.tokenising import CHUNK, reading, tokenise
from secateurs.training.context import context_length

__all__ = ["CHAT_TEMPLATE", "ChatData", "TextData", "load_conversations", "packed_blocks"]

GENERATION = re.compile(r"\{%-?\s*generation\b")  # what marks answers in a chat template


def packed_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    field: str = "text",
    split: Split = "calibration",
    progress: bool = False,
) -> Tensor:
    """All of a text as blocks without padding, for continual pre-training.

    Documents follow one another with an end-of-text token behind each (conversations as their template ends
    them); a block may begin and end within one, and attention sees across. Blank documents are left out, with
    a warning that counts them. What is left over at the end is dropped.

    Args:
        source: see `secateurs.text.load_text`. Rows of a file are documents; WikiText-2 and PTB, whose rows
            are lines, are one.
        tokenizer: makes the tokens, with its own defaults about special tokens.
        length: tokens in a block.
        field: see `secateurs.text.load_text`.
        split: see `secateurs.text.load_text`.
        progress: show a progress line on standard error.

    Returns:
        (blocks, length) int64 token ids on the CPU, in the order of the text.

    Raises:
        ValueError: the text cannot be had (see `load_text`) or is shorter than a block, or the tokenizer has
            no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to put between documents")
    text = load_text(source, field=field, split=split, tokenizer=tokenizer)
    if source in PUBLISHED and text.separator is not None:  # its rows are lines of one document
        text = Text([text.joined])
    end = None if text.rendered else tokenizer.eos_token_id
    packed = numpy.concatenate([numpy.zeros(0, numpy.int32), *_packed(text, tokenizer, end, progress)])
    if len(packed) < length:
        raise ValueError(
            f"'{source}' has {len(packed)} tokens, one block needs {length}: "
            "give more text or a smaller length"
        )
    whole = packed[: len(packed) // length * length]
    return torch.from_numpy(whole).to(torch.int64).view(-1, length)


def _packed(
    text: Text, tokenizer: PreTrainedTokenizerBase, end: int | None, progress: bool
) -> Iterator[numpy.ndarray]:
    """The tokens of each document, int32, with `end` behind it."""
    blank = 0
    batch: list[str] = []
    size = 0

    def tokens_of_batch() -> Iterator[numpy.ndarray]:
        if batch:
            advance(size)
            ids = tokenizer(batch, verbose=False, add_special_tokens=not text.rendered)["input_ids"]
            yield from (_ended(numpy.array(document, dtype=numpy.int32), end) for document in ids)

    parts = iter(text.parts())
    with reading(progress) as advance:
        for piece in parts:
            if piece.ends and is_blank(piece.text):
                blank += 1
                continue
            long = not piece.ends or len(piece.text) > CHUNK
            if long or size + len(piece.text) > CHUNK:
                yield from tokens_of_batch()
                batch, size = [], 0
            if long:
                pieces = [piece.text] if piece.ends else chain([piece.text], _rest(parts))
                ids = tokenise(pieces, tokenizer, rendered=text.rendered, advance=advance)
                yield _ended(ids.to(torch.int32).numpy(), end)
            else:
                batch.append(piece.text)
                size += len(piece.text)
        yield from tokens_of_batch()
    if blank:
        warnings.warn(f"{blank} documents are left out: they are blank", stacklevel=3)


def _rest(parts: Iterator[Piece]) -> Iterator[str]:
    """The pieces of a document that has begun."""
    for piece in parts:
        yield piece.text
        if piece.ends:
            return


def _ended(ids: numpy.ndarray, end: int | None) -> numpy.ndarray:
    return ids if end is None or (len(ids) and ids[-1] == end) else numpy.append(ids, numpy.int32(end))


@dataclass(frozen=True)
class TextData:
    """Blocks of running text (see `packed_blocks`), every token of which is learnt."""

    train: Tensor
    validation: Tensor | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """Trainer's settings that follow from the kind of data."""
        return {"include_num_input_tokens_seen": "all", "label_names": ["labels"]}

    def trainer(self, **parts: Any) -> Trainer:
        """A Trainer with this data and all the `parts` that a Trainer takes beside."""

        def rows(blocks: Tensor) -> list[dict[str, Tensor]]:
            return [{"input_ids": block, "labels": block} for block in blocks]

        held_out = None if self.validation is None else rows(self.validation)
        # All rows have one length: Trainer's own collator would ask the tokenizer for a padding token.
        return Trainer(
            train_dataset=rows(self.train),
            eval_dataset=held_out,
            data_collator=default_data_collator,
            **parts,
        )


@dataclass(frozen=True)
class Lesson:
    """A conversation as a model is trained on it."""

    ids: numpy.ndarray
    """(tokens,) int32"""
    learnt: numpy.ndarray
    """(tokens,) bool"""


def lessons_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Lesson]:
    """The tokens of a conversation, and which of them are its answers.

    Learnt is what the model would have to write: an answer begins where the conversation before it ends,
    rendered with what asks for one, and it ends where the conversation up to it does; tool calls and what
    ends the turn included. A last answer so has the tokens that TRL finds for a prompt and its completion.
    Where there are several and the template marks them by `{% generation %}`, its marks count.

    An answer that the template renders otherwise once the conversation goes on (Qwen3 takes the reasoning
    out) gets a lesson of its own, which ends with it: that is how the model will be asked for it.

    Raises:
        ValueError: the template refuses the conversation, or does not show where an answer begins; names
            file and row.
    """
    whole = render(conversation, tokenizer)
    answers, last = conversation.answers, len(conversation.messages) - 1
    if answers != [last] and GENERATION.search(template_of(tokenizer, conversation.options)):
        roles = [message["role"] for message in conversation.messages]
        if len(answers) == roles.count("assistant"):
            return [_marked(conversation, tokenizer)]
    lessons: list[Lesson] = []
    texts = [whole]
    for answer in answers:
        until = whole if answer == last else apply_template(conversation.first(answer + 1), tokenizer)
        if not whole.startswith(until):  # Phi-3 writes an end-of-text token behind the last message only
            until = until.removesuffix(str(tokenizer.eos_token))
        if not whole.startswith(until):
            lessons += lessons_of(conversation.first(answer + 1, prompt=answer), tokenizer)
            continue
        before = apply_template(conversation.first(answer), tokenizer, add_generation_prompt=True)
        # What asks for an answer may say more than is left of it, but all that came before must be there.
        shown = answers == [last] or whole.startswith(before)
        if not shown and not whole.startswith(apply_template(conversation.first(answer), tokenizer)):
            raise ValueError(
                f"{conversation.where}: the model's chat template does not show where the answer in "
                f"message {answer + 1} begins: mark answers by {{% generation %}} in it"
            )
        texts += [before, until]
    ids, *others = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    learnt = numpy.zeros(len(ids), dtype=bool)
    for before, until in zip(others[::2], others[1::2], strict=True):
        learnt[_shared(before, ids) : _shared(until, ids)] = True
    if others:
        lessons.append(Lesson(numpy.array(ids, dtype=numpy.int32), learnt))
    return lessons


def _marked(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Lesson:
    """As the template's `{% generation %}` marks it."""
    tokens = apply_template(
        conversation,
        tokenizer,
        tokenize=True,
        tokenizer_kwargs={"verbose": False},
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    learnt = numpy.array(tokens["assistant_masks"], dtype=bool)
    if not learnt.any():
        raise ValueError(f"{conversation.where}: the model's chat template marks no token of it as learnt")
    return Lesson(numpy.array(tokens["input_ids"], dtype=numpy.int32), learnt)


def _shared(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


@dataclass(frozen=True)
class ChatData:
    """Conversations (see `load_conversations`), the answers of which are learnt, through TRL."""

    train: list[Conversation]
    validation: list[Conversation] | None
    length: int
    """Tokens to which longer conversations are cut."""
    lessons: dict[str, list[Lesson]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What `check_template` makes of both."""

    @property
    def digest(self) -> str:
        content = [[chat.messages, chat.options, chat.prompt] for chat in self.train]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the conversations by the tokenizer's chat template, so that what it refuses is known.

        Raises:
            ValueError: see `lessons_of`.
        """
        for name, chats in (("train", self.train), ("validation", self.validation or [])):
            self.lessons[name] = [lesson for chat in chats for lesson in lessons_of(chat, tokenizer)]

    @property
    def settings(self) -> dict[str, Any]:
        """Trainer's settings that follow from the kind of data."""
        return {
            "include_num_input_tokens_seen": "non_padding",
            "max_length": self.length,
            "assistant_only_loss": False,  # what TRL would do to conversations is done
        }

    def trainer(self, **parts: Any) -> Trainer:
        """An SFTTrainer with this data and all the `parts` that a Trainer takes beside.

        Raises:
            ValueError: no conversation has an answer, or a part of one, within the length.
        """
        from datasets import Dataset
        from datasets.utils import disable_progress_bars, enable_progress_bars
        from trl import SFTTrainer

        if not self.lessons:
            self.check_template(parts["processing_class"])

        def rows(lessons: list[Lesson]) -> Dataset:
            return Dataset.from_dict(
                {
                    "input_ids": [lesson.ids for lesson in lessons],
                    "assistant_masks": [lesson.learnt.astype(numpy.int8) for lesson in lessons],
                }
            )

        class OwnLoss(SFTTrainer):
            """On a CPU TRL's fused head makes the logits of all positions, twice (benchmarks/head.py): there
            a training step takes the model's own loss, and wherever contexts are only read, which are found
            by the labels that the model is called with. Not so with a router's, which TRL adds by itself."""

            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                usual = getattr(self.args, "loss_type", "nll") != "dft"
                usual = usual and not self.aux_loss_enabled
                own = self.args.device.type == "cpu" or context_length(model) is not None
                if usual and model.training and own:
                    return Trainer.compute_loss(self, model, inputs, *args, **kwargs)
                return super().compute_loss(model, inputs, *args, **kwargs)

            def log(self, *args: Any, **kwargs: Any) -> None:
                for metrics in self._metrics.values():
                    metrics.pop("num_tokens", None)  # TRL's loss counts; `num_input_tokens_seen` is right
                super().log(*args, **kwargs)

        held_out = None if self.validation is None else rows(self.lessons["validation"])
        disable_progress_bars()
        try:
            trainer = OwnLoss(train_dataset=rows(self.lessons["train"]), eval_dataset=held_out, **parts)
        finally:
            enable_progress_bars()
        kept, all_of_them = len(trainer.train_dataset), len(self.lessons["train"])  # type: ignore[arg-type]
        if not kept:
            raise ValueError(
                f"no conversation has an answer within {self.length} tokens: choose a greater length"
            )
        if kept < all_of_them:
            warnings.warn(
                f"{all_of_them - kept} of {all_of_them} conversations are left out: no answer within "
                f"{self.length} tokens",
                stacklevel=2,
            )
        return trainer
