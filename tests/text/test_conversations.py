"""Rows as people keep conversations, and what a template makes of them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from characters import characters
from secateurs.text import Conversation, calibration_blocks, evaluation_tokens, load_conversations, load_text
from secateurs.text.conversations import CHAT_TEMPLATE, conversation_of
from secateurs.text.files import Row

SYSTEM = {"role": "system", "content": "Be kind."}
USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CHATML = (
    "{{ '<s>' }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talking(template: str | None = CHATML) -> PreTrainedTokenizerBase:
    tokenizer = characters(begin=True)
    tokenizer.chat_template = template
    return tokenizer


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


FORMS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": [USER, ANSWER], "source": "elsewhere"}, [USER, ANSWER]),
    ({"conversations": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"messages": [{**m, "content": parts(m["content"])} for m in (USER, ANSWER)]}, [USER, ANSWER]),
    ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    ({"messages": [USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER, ANSWER]),
    (
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
        [USER, ANSWER],
    ),
    (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "What?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "20 C"},
                {"from": "gpt", "value": "That."},
            ]
        },
        [SYSTEM, USER, CALLING, {"role": "tool", "content": "20 C"}, ANSWER],
    ),
    ({"question": "What?", "answer": "That."}, [USER, ANSWER]),
    ({"prompt": "What?", "completion": "That."}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"prompt": "What?", "response": "That."}, [USER, ANSWER]),
    ({"instruction": "What?", "input": "", "output": "That."}, [USER, ANSWER]),
    (
        {"instruction": "Add.", "input": "2+2", "output": "4", "system": "Be kind.", "history": [["a", "b"]]},
        [
            SYSTEM,
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "Add.\n2+2"},
            {"role": "assistant", "content": "4"},
        ],
    ),
    ({"instruction": "What?", "context": None, "response": "That."}, [USER, ANSWER]),
    # Tool calls as they come: no content, arguments as text, the older form of one call.
    ({"messages": [USER, {**CALLING, "content": None}, ANSWER]}, [USER, CALLING, ANSWER]),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
                    ],
                },
                {"role": "tool", "content": "20 C", "tool_call_id": "1", "name": "weather"},
                {**ANSWER, "reasoning_content": "Hm."},
            ]
        },
        [
            USER,
            CALLING,
            {"role": "tool", "content": "20 C", "tool_call_id": "1", "name": "weather"},
            {**ANSWER, "reasoning_content": "Hm."},
        ],
    ),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                ANSWER,
            ]
        },
        [USER, CALLING, ANSWER],
    ),
]


@pytest.mark.parametrize(("row", "messages"), FORMS)
def test_the_forms_of_a_row(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    found = conversation_of(Row(row, "here"))
    assert found is not None
    assert found.messages == messages
    assert found.options == {}


@pytest.mark.parametrize(("row", "messages"), FORMS)
def test_columns_fill_what_a_row_lacks_with_nulls(
    row: dict[str, Any], messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Arrow gives every message the fields of all, and every row of a table all columns."""
    rows = [row, row]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        assert [chat.messages for chat in load_conversations(tmp_path / source)] == [messages] * len(rows)


def test_tools_are_kept_in_every_form(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, CALLING, ANSWER], "tools": TOOLS},
        {"messages": [USER, CALLING, ANSWER], "tools": json.dumps(TOOLS)},
        {"messages": [USER, CALLING, ANSWER], "functions": [TOOLS[0]["function"]]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for chat in load_conversations(file):
        assert chat.options == {"tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1 has a part .*image_url",
        ),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 is from 'narrator'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "message 2: a tool call without"),
        ({"messages": "hello"}, "field 'messages' is not a list but str"),
        ({"messages": "[hello"}, "not JSON"),
        ({"messages": [USER, ANSWER], "tools": "a hammer"}, "field 'tools' is not a list but str"),
        ({"prompt": "x", "chosen": "y"}, "needs the field 'messages'.*; it has: prompt, chosen"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^'a.jsonl', line 3: {message}") as caught:
        conversation_of(Row(row, "'a.jsonl', line 3"))
    assert "\n" not in str(caught.value)


def test_null_rows_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": None}) + "\n" + json.dumps({"messages": [USER, ANSWER]}))
    with pytest.warns(UserWarning, match="1 rows without a conversation are left out"):
        assert load_conversations(file) == [Conversation([USER, ANSWER])]


def test_text_is_what_the_template_writes(tmp_path: Path) -> None:
    """Special tokens as tokens, no second one at the beginning, nothing between conversations."""
    file = tmp_path / "a.jsonl"
    rows = [{"messages": [SYSTEM, USER, CALLING, ANSWER], "tools": TOOLS}, {"messages": [USER, ANSWER]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = talking()
    written = [
        tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"))["input_ids"] for row in rows
    ]
    tokens = [token for ids in written for token in ids]
    assert tokens.count(tokenizer.bos_token_id) == 2
    assert evaluation_tokens(file, tokenizer).tolist() == tokens
    assert evaluation_tokens(file, tokenizer, field="messages").tolist() == tokens
    [block] = calibration_blocks(file, tokenizer, samples=1, length=len(tokens) - 1).tolist()
    assert block == tokens[:-1]


def test_a_tokenizer_without_a_template_writes_plain_words(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("question,answer\nWhat?,That.\n")
    assert load_text(file, tokenizer=talking(None)).joined == "<s>User: What?\nAssistant: That.</s>"
    with pytest.raises(ValueError, match=r"a\.csv', line 2: a conversation, which takes a tokenizer"):
        load_text(file)
    file = tmp_path / "tools.json"
    file.write_text(json.dumps({"messages": [USER, CALLING], "tools": TOOLS}))
    text = load_text(file, tokenizer=talking(CHAT_TEMPLATE)).joined
    assert json.dumps(TOOLS) in text
    assert json.dumps([CALL]) in text


def test_text_comes_before_messages(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "as it is", "messages": [USER, ANSWER]}))
    assert load_text(file, tokenizer=talking()).documents == ["as it is"]


REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


BREAKS = "{{ messages[2].content + 1 if messages[2] }}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (REFUSES, {"messages": [SYSTEM, USER, ANSWER]}, r"refuses .* \(System role not supported\)"),
        (REFUSES, {"messages": [USER, USER, ANSWER]}, r"refuses .* \(Conversation roles must alternate\)"),
        (
            "{{ messages[0].content + (messages[2].content + 1) if messages[2] }}",
            {"messages": [USER] * 3},
            "refuses",
        ),
        ("{{ messages[0].content }}", {"messages": [USER], "tools": TOOLS}, "has no place for tools"),
        ("{{ messages[0].content }}", {"messages": [USER, CALLING]}, "has no place for tool calls"),
    ],
)
def test_what_the_template_refuses_is_named(
    template: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=rf"a\.jsonl', line 2: the model's chat template {message}"
    ) as caught:
        evaluation_tokens(file, talking(template))
    assert "\n" not in str(caught.value)


def test_arguments_are_text_where_the_template_takes_only_that(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [USER, CALLING]}))
    template = (
        "{% for m in messages if m.tool_calls %}{{ '>' + m.tool_calls[0].function.arguments }}{% endfor %}"
    )
    assert load_text(file, tokenizer=talking(template)).joined == '>{"city": "Paris"}'
