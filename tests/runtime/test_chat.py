"""Conversations, against transformers' own `generate` on what the chat template writes."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateurs
from secateurs import cli
from secateurs.demo import MODEL
from secateurs.runtime.chat import Chat, _Stream
from secateurs.runtime.settings import ChatSettings

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template that has no place for a system prompt."""
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("chat") / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def generated(folder: Path, text: str, tokens: int) -> str:
    """The likeliest tokens after a text."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_each_answer_is_to_all_that_was_said(templated: Path) -> None:
    chat = Chat(templated, ChatSettings(tokens=8, device="cpu"))
    said: list[str] = []
    pace = chat.answer("Who is there?", said.append)
    first = generated(templated, "[user] Who is there?\n[assistant]", 8)
    assert "".join(said).strip() == first
    assert pace.tokens == 8
    assert pace.tokens_per_second > 0
    lengths: list[int] = []
    embedding = chat.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    chat.answer("Nobody?", lambda piece: None)
    asked = f"[user] Who is there?\n[assistant] {first}\n[user] Nobody?\n[assistant]"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[-1]["content"] == generated(templated, asked, 8)
    whole = AutoTokenizer.from_pretrained(templated)(asked).input_ids
    assert 0 < lengths[0] < len(whole), "what was read before is not read again"
    assert lengths[1:] == [1] * 7
    chat.messages = [{"role": "assistant", "content": "Nobody."}]  # nothing in common with what was read
    chat.answer("Where?", lambda piece: None)
    asked = "[assistant] Nobody.\n[user] Where?\n[assistant]"
    assert chat.messages[-1]["content"] == generated(templated, asked, 8)
    chat.reset()
    assert chat.messages == []


def test_what_was_read_is_forgotten_by_reset_and_where_positions_change_with_length(templated: Path) -> None:
    chat = Chat(templated, ChatSettings(tokens=4, device="cpu"))
    chat.answer("Who is there?", lambda piece: None)
    assert chat.cache is not None
    chat.reset()
    assert chat.cache is None
    chat.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    chat.answer("Who is there?", lambda piece: None)
    assert chat.cache is None


def test_an_interruption_ends_the_answer_and_keeps_what_was_said(templated: Path) -> None:
    chat = Chat(templated, ChatSettings(tokens=40, device="cpu"))
    said: list[str] = []

    def show(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    assert chat.answer("Who is there?", show).tokens < 40
    assert len(said) >= 3
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(said).strip()}
    chat.answer("And now?", lambda piece: None)
    assert len(chat.messages) == 4


def test_a_model_without_a_template_stops_where_the_user_would_speak() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    said: list[str] = []
    stream = _Stream(tokenizer, said.append, torch.device("cpu"), "User:")
    for token in [0, *tokenizer(" Yes, sir.\nUser:").input_ids]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(said).strip() == stream.text.strip() == "Yes, sir."


def test_questions_through_a_pipe(
    templated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = templated.parent / "small"
    secateurs.prune(templated, output=templated.parent / "pruned", method="magnitude", pattern="70%")
    secateurs.compress(templated.parent / "pruned", small)
    capsys.readouterr()

    def piped(folder: Path, lines: str, *options: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        arguments = ["secateurs", "chat", str(folder), "--tokens", "4", "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        cli.main()
        return capsys.readouterr()

    again = piped(small, "Who is there?\n\n/reset\n/rest\nWho is there?\n/quit\nNever asked\n")
    one, other = again.out.splitlines()
    assert one == other
    assert one.strip() == generated(templated.parent / "pruned", "[user] Who is there?\n[assistant]", 4)
    assert again.err.count("tokens per second") == 2
    assert "there is no /rest. /reset forgets" in again.err
    broken = piped(templated, "Who is \udcff?\nWho is there?\n")
    assert len(broken.out.splitlines()) == 1
    assert r"the question is not UTF-8: 'Who is \udcff?'" in broken.err
    plain = piped(MODEL, "Who is there?\n", "--system", "Be brief.")
    assert len(plain.out.splitlines()) == 1, "without a template of its own, and to the end of the input"
    with pytest.raises(SystemExit) as end:
        piped(templated, "Who is there?\n", "--system", "Be brief.")
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "refuses" in line
    assert "no system role" in line


def test_a_conversation_that_is_too_long_says_so_and_goes_on_shorter(templated: Path) -> None:
    chat = Chat(templated, ChatSettings(tokens=40, device="cpu"))
    with pytest.raises(ValueError, match="made for 512: /reset"):
        chat.answer("Who is there? " * 200, lambda piece: None)
    assert chat.messages == []
    tokenizer = AutoTokenizer.from_pretrained(templated)
    question = "Who? " * 240
    asked = len(tokenizer(f"[user] {question}\n[assistant]").input_ids)
    assert 472 < asked < 512
    assert chat.answer(question, lambda piece: None).tokens == 512 - asked
