"""Blocks for pre-training, conversations for fine-tuning, and which of their tokens count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import families
import secateurs.demo
from characters import characters
from secateurs.text import Conversation, load_tokenizer
from secateurs.training.arguments import trainer_arguments
from secateurs.training.data import (
    CHAT_TEMPLATE,
    ChatData,
    Lesson,
    lessons_of,
    load_conversations,
    packed_blocks,
)

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


def test_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "text.jsonl", [{"text": text} for text in ("", "ab", " \n", "c")])
    with pytest.warns(UserWarning, match="2 documents are left out: they are blank"):
        blocks = packed_blocks(file, characters(begin=True), length=1)
    assert blocks.flatten().tolist() == [1, ord("a"), ord("b"), END, 1, ord("c"), END]


def test_conversations_are_packed_as_their_template_ends_them(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "chat.jsonl", [{"messages": [USER, ANSWER]}] * 2)
    blocks = packed_blocks(file, characters(begin=True), length=1)
    one = [1, *map(ord, "User: What?\nAssistant: That."), END]
    assert blocks.flatten().tolist() == one * 2


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


# Which tokens are answers. TRL keeps the chat templates of many families, and next to each one a version that
# marks the answers by {% generation %}.
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MORE, LAST = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, of course."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLING = Conversation(
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "20 C"},
        LAST,
    ],
    {"tools": TOOLS},
)
SEVERAL = Conversation([USER, ANSWER, MORE, LAST])
OPENED = Conversation([SYSTEM, USER, ANSWER, MORE, LAST])


def real(template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(Path(secateurs.demo.__file__).parent / "model")
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


def same(one: Lesson, other: Lesson) -> bool:
    return one.ids.tolist() == other.ids.tolist() and one.learnt.tolist() == other.learnt.tolist()


@pytest.mark.parametrize(
    ("template", "conversation"),
    [
        ("llama3", OPENED),
        ("gemma", SEVERAL),
        ("gemma3", OPENED),
        ("phi3", OPENED),
        ("qwen3_instruct_2507", OPENED),
        ("qwen3_instruct_2507", CALLING),
        ("lfm2_v2", CALLING),
        ("cohere", OPENED),
    ],
)
def test_answers_are_found_where_a_template_marks_them(template: str, conversation: Conversation) -> None:
    [found] = lessons_of(conversation, real(template))
    [marked] = lessons_of(conversation, real(template + "_training"))
    assert same(found, marked)
    assert 0 < found.learnt.sum() < len(found.learnt)


def test_an_answer_that_is_rendered_otherwise_later_has_a_lesson_of_its_own() -> None:
    """Qwen3 gives only the last answer its (empty) thoughts; the version for training gives them to all."""
    tokenizer = real("qwen3")
    lessons = lessons_of(SEVERAL, tokenizer)
    answers = [tokenizer.decode(lesson.ids[lesson.learnt]) for lesson in lessons]
    assert answers == [
        "<think>\n\n</think>\n\nThat.<|im_end|>\n",
        "<think>\n\n</think>\n\nYes, of course.<|im_end|>\n",
    ]
    [marked] = lessons_of(SEVERAL, real("qwen3_training"))
    assert tokenizer.decode(marked.ids[marked.learnt]) == "".join(answers)
    for lesson, messages in zip(lessons, ([USER, ANSWER], SEVERAL.messages), strict=True):
        assert lesson.ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("template", ["llama3", "gemma", "qwen2_5", "qwen3", "phi3", "cohere", "deepseekv3"])
def test_a_single_answer_has_the_labels_that_trl_gives_it(template: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # The first answer is part of the prompt.
    conversation = Conversation([USER, ANSWER, MORE, LAST], prompt=3)
    [lesson] = lessons_of(conversation, real(template))
    rows = {"prompt": [conversation.messages[:3]], "completion": [conversation.messages[3:]]}
    tokenizer = real(template)
    trainer = SFTTrainer(
        model=families.build("llama"),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    [row] = list(trainer.train_dataset)
    labels = [token if counts else -100 for token, counts in zip(lesson.ids, lesson.learnt, strict=True)]
    assert (row["input_ids"], row["labels"]) == (lesson.ids.tolist(), labels)


def test_what_is_not_learnt_on_request() -> None:
    weighed = Conversation([USER, {**ANSWER, "weight": 0}, MORE, LAST])
    tokenizer = real("qwen2_5")
    [lesson] = lessons_of(weighed, tokenizer)
    assert tokenizer.decode(lesson.ids[lesson.learnt]) == "Yes, of course.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        ("gemma", OPENED, "refuses this conversation .System role not supported"),
        ("gemma", Conversation([USER, MORE, LAST]), "refuses .* roles must alternate"),
        ("llama3", CALLING, "has no place for tool calls"),
    ],
)
def test_what_a_template_refuses_is_known_before_training(
    template: str, conversation: Conversation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChatData([conversation], None, 100).check_template(real(template))


def test_a_template_that_does_not_show_where_answers_begin() -> None:
    tokenizer = real("qwen2_5")
    tokenizer.chat_template = (
        "{% if add_generation_prompt or messages[-1].role != 'assistant' %}?{% endif %}"
        "{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"does not show where the answer in message 2 begins"):
        lessons_of(SEVERAL, tokenizer)
    [lesson] = lessons_of(Conversation([USER, ANSWER]), tokenizer)  # a single one is found as TRL finds it
    assert tokenizer.decode(lesson.ids[lesson.learnt]) == "What?;That.;"
