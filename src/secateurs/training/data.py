"""What a model is trained on: packed blocks of running text, or conversations of which the answers count."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, default_data_collator

from secateurs.text.sources import PUBLISHED, Split, load_text

Message = dict[str, str]
Conversation = list[Message]

# Of rows that are one question and its answer.
PAIRS = (("question", "answer"), ("prompt", "completion"))

# For a tokenizer without a template of its own: plain words, since a model that has never seen a chat has no
# tokens for its turns. The answer and the end-of-text token are what TRL computes the loss on.
CHAT_TEMPLATE = (
    "{{- bos_token if bos_token }}"
    "{%- for message in messages %}"
    "{{- message['role'] | capitalize }}:"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}"
    "{%- else %}"
    "{{- ' ' + message['content'] | trim + '\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)

GENERATION = re.compile(r"\{%-?\s*generation\b")  # what marks answers in a chat template


def packed_blocks(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    field: str = "text",
    split: Split = "calibration",
) -> Tensor:
    """All of a text as blocks without padding, for continual pre-training.

    Documents follow one another with an end-of-text token behind each; a block may begin and end within one,
    and attention sees across. What is left over at the end is dropped.

    Args:
        source: see `secateurs.text.load_text`. Rows of a file are documents; WikiText-2 and PTB, whose rows
            are lines, are one.
        tokenizer: makes the tokens, with its own defaults about special tokens.
        length: tokens in a block.
        field: see `secateurs.text.load_text`.
        split: see `secateurs.text.load_text`.

    Returns:
        (blocks, length) int64 token ids on the CPU, in the order of the text.

    Raises:
        ValueError: the text cannot be had (see `load_text`) or is shorter than a block, or the tokenizer has
            no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to put between documents")
    text = load_text(source, field=field, split=split)
    lines = source in PUBLISHED and text.separator is not None
    documents = [text.joined] if lines else list(text.documents)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    # Not verbose: it would warn of texts longer than the model's window.
    for tokens in tokenizer(documents, verbose=False)["input_ids"]:
        ids.extend(tokens)
        if not tokens or tokens[-1] != end:
            ids.append(end)
    if len(ids) < length:
        raise ValueError(
            f"'{source}' has {len(ids)} tokens, one block needs {length}: give more text or a smaller length"
        )
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def load_conversations(source: str | Path) -> list[Conversation]:
    """Read conversations from a jsonl file.

    Args:
        source: a row has `messages` (objects with `role` and `content`, at least one of them an assistant's),
            or `question` and `answer`, or `prompt` and `completion`.

    Raises:
        ValueError: the file cannot be read, or a row is not a conversation; names the line.
    """
    try:
        with open(source, encoding="utf-8-sig") as lines:
            found = [
                _messages(line, f"'{source}', line {number}")
                for number, line in enumerate(lines, start=1)
                if not line.isspace()
            ]
    except UnicodeDecodeError as error:
        raise ValueError(f"'{source}' is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"cannot read '{source}': {error.strerror or error}") from None
    if not found:
        raise ValueError(f"'{source}' holds no conversations")
    return found


def _messages(line: str, where: str) -> Conversation:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with fields")
    if "messages" in row:
        messages = list(_checked(row["messages"], where))
        roles = [message["role"] for message in messages]
        if "assistant" not in roles[1:]:
            raise ValueError(f"{where}: no message of the role 'assistant' that answers another")
        return messages
    for pair in PAIRS:
        if all(name in row for name in pair):
            for name in pair:
                if not isinstance(row[name], str):
                    raise ValueError(f"{where}: field '{name}' is not text but {type(row[name]).__name__}")
            return [
                {"role": "user", "content": row[pair[0]]},
                {"role": "assistant", "content": row[pair[1]]},
            ]
    raise ValueError(
        f"{where}: needs the field 'messages', or 'question' and 'answer', or 'prompt' and 'completion'; "
        f"it has: {', '.join(row)}"
    )


def _checked(messages: Any, where: str) -> Iterator[Message]:
    if not isinstance(messages, list):
        raise ValueError(f"{where}: field 'messages' is not a list but {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise ValueError(f"{where}: message {number} is not an object with text in 'role' and 'content'")
        yield {name: fields[name] for name in ("role", "content")}


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
class ChatData:
    """Conversations (see `load_conversations`), the answers of which are learnt, through TRL."""

    train: list[Conversation]
    validation: list[Conversation] | None
    length: int
    """Tokens to which longer conversations are cut."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.train).encode()).hexdigest()

    @property
    def single(self) -> bool:
        """Whether every conversation ends with its only answer; such data suit any chat template."""
        return all(
            [message["role"] for message in messages].index("assistant") == len(messages) - 1
            for messages in self.train + (self.validation or [])
        )

    def check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if the tokenizer's chat template cannot tell which tokens are answers."""
        from trl import get_training_chat_template

        if self.single or GENERATION.search(str(tokenizer.chat_template)):
            return
        try:
            get_training_chat_template(tokenizer)
        except ValueError:
            raise ValueError(
                "there are conversations with several answers, and the model's chat template does not mark "
                "them: put {% generation %} and {% endgeneration %} around an answer in it, or give "
                "conversations that end with their only answer"
            ) from None

    @property
    def settings(self) -> dict[str, Any]:
        """Trainer's settings that follow from the kind of data."""
        return {
            "include_num_input_tokens_seen": "non_padding",
            "max_length": self.length,
            "assistant_only_loss": not self.single,
        }

    def trainer(self, **parts: Any) -> Trainer:
        """An SFTTrainer with this data and all the `parts` that a Trainer takes beside.

        Raises:
            ValueError: no conversation has an answer, or a part of one, within the length.
        """
        from datasets import Dataset
        from datasets.utils import disable_progress_bars, enable_progress_bars
        from trl import SFTTrainer

        single = self.single

        def rows(conversations: list[Conversation]) -> Dataset:
            if not single:
                return Dataset.from_dict({"messages": conversations})
            prompts = [messages[:-1] for messages in conversations]
            return Dataset.from_dict(
                {"prompt": prompts, "completion": [messages[-1:] for messages in conversations]}
            )

        held_out = None if self.validation is None else rows(self.validation)
        disable_progress_bars()
        try:
            trainer = SFTTrainer(train_dataset=rows(self.train), eval_dataset=held_out, **parts)
        finally:
            enable_progress_bars()
        kept = len(trainer.train_dataset)  # type: ignore[arg-type]
        if not kept:
            raise ValueError(
                f"no conversation has an answer within {self.length} tokens: choose a greater length"
            )
        if kept < len(self.train):
            warnings.warn(
                f"{len(self.train) - kept} of {len(self.train)} conversations are left out: no answer within "
                f"{self.length} tokens",
                stacklevel=2,
            )
        return trainer
