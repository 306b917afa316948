"""Blocks for pre-training, conversations for fine-tuning, and which of their tokens count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import families
from characters import characters
from secateurs.text import Conversation
from secateurs.training.data import (
    CHAT_TEMPLATE,
    ChatData,
    load_conversations,
    packed_blocks,
)
from secateurs.training.settings import trainer_arguments

END = 2
USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@given(documents=st.lists(st.text("abc", min_size=1, max_size=20), min_size=1, max_size=8))
def test_blocks_hold_all_documents_with_an_end_behind_each(
    documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = jsonl(tmp_path_factory.mktemp("data") / "text.jsonl", [{"story": text} for text in documents])
    expected = [code for text in documents for code in [*map(ord, text), END]]
    length = min(5, len(expected))
    blocks = packed_blocks(file, characters(), length=length, field="story")
    assert blocks.dtype == torch.int64
    assert blocks.flatten().tolist() == expected[: len(expected) // length * length]
    assert blocks.shape[1] == length


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab\ncd")
    [block] = packed_blocks(file, characters(), length=6).tolist()
    assert block == [*map(ord, "ab\ncd"), END]


def test_a_beginning_opens_every_document(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "text.jsonl", [{"text": "a"}, {"text": "b"}])
    [block] = packed_blocks(file, characters(begin=True), length=6).tolist()
    assert block == [1, ord("a"), END, 1, ord("b"), END]


def test_too_little_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc")
    with pytest.raises(ValueError, match=r"has 4 tokens, one block needs 5"):
        packed_blocks(file, characters(), length=5)


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        packed_blocks(tmp_path / "text.txt", tokenizer, length=5)


def test_the_forms_of_a_conversation(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ANSWER], "source": "elsewhere"},
        {"question": "What?", "answer": "That."},
        {"prompt": "What?", "completion": "That."},
    ]
    assert load_conversations(jsonl(tmp_path / "chat.jsonl", rows)) == [Conversation([USER, ANSWER])] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: a list, not an object"),
        ('{"question": "What?"}', "line 2: needs the field 'messages', or 'question' and 'answer'"),
        ('{"question": "What?", "answer": 4}', "line 2: field 'answer' is not text but int"),
        ('{"messages": "hello"}', "line 2: field 'messages' is not a list but str"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 is not an object with text in"),
        (
            '{"messages": [{"role": "user", "content": "What?"}]}',
            "line 2: no message of the role 'assistant'",
        ),
        ('{"messages": [{"role": "assistant", "content": "That."}]}', "line 2: no message of the role"),
    ],
)
def test_what_is_no_conversation_names_its_line(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text('{"question": "What?", "answer": "That."}\n' + row + "\n")
    with pytest.raises(ValueError, match=message):
        load_conversations(file)


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_no_conversations(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "chat.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"no text at|holds no conversations"):
        load_conversations(file)


def learnt(conversations: list[list[dict[str, str]]], length: int, tmp_path: Path) -> list[tuple[str, str]]:
    """For each conversation as TRL prepares it, the text that the model sees and what it learns of it."""
    from trl import SFTConfig

    tokenizer = characters()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = ChatData([Conversation(messages) for messages in conversations], None, length)
    data.check_template(tokenizer)
    arguments = trainer_arguments(
        SFTConfig, {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **data.settings}
    )
    trainer = data.trainer(model=families.build("llama"), args=arguments, processing_class=tokenizer)

    def text(ids: list[int]) -> str:
        return "".join({1: "<s>", 2: "</s>"}.get(token, chr(token)) for token in ids)

    return [
        (text(row["input_ids"]), text([label for label in row["labels"] if label != -100]))
        for row in trainer.train_dataset
    ]


def test_only_the_answer_is_learnt(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert learnt([[system, USER, ANSWER]], 100, tmp_path) == [
        ("<s>System: Be brief.\nUser: What?\nAssistant: That.</s>", " That.</s>")
    ]


def test_every_answer_of_a_conversation_is_learnt(tmp_path: Path) -> None:
    more = {"role": "user", "content": "Sure?"}
    assert learnt([[USER, ANSWER, more, ANSWER, more], [USER, ANSWER]], 100, tmp_path) == [
        (
            "<s>User: What?\nAssistant: That.</s>User: Sure?\nAssistant: That.</s>User: Sure?\n",
            " That.</s> That.</s>",
        ),
        ("<s>User: What?\nAssistant: That.</s>", " That.</s>"),
    ]


def test_long_conversations_are_cut_and_those_without_an_answer_left_are_dropped(tmp_path: Path) -> None:
    long = {"role": "user", "content": "What? " * 10}
    with pytest.warns(UserWarning, match="1 of 2 conversations"):
        found = learnt([[USER, ANSWER], [long, ANSWER]], 27, tmp_path)
    assert found == [("<s>User: What?\nAssistant: Tha", " Tha")]
    with pytest.raises(ValueError, match="no conversation has an answer within 10 tokens"):
        learnt([[USER, ANSWER]], 10, tmp_path)
