"""Conversations: rows in the forms that people keep them in, made messages, rendered by a chat template.

A row is one of
- `messages` or `conversations`, each with `role` and `content` as OpenAI has them, tool calls, results and
  reasoning included, or with `from` and `value` (ShareGPT), with `tools` and `system` beside;
- `instruction` with `output` or `response`, and perhaps `input` or `context`, `system`, `history` (Alpaca);
- `question` and `answer`, `prompt` and `completion` (texts, or lists of messages), `prompt` and `response`,
  `query` and `response`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateurs.text.files import Row

Message = dict[str, Any]

LISTS = ("messages", "conversations")
PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
BESIDE = ("input", "context", "system", "history", "tools", "functions", "documents", "chat_template_kwargs")
FIELDS = (*LISTS, *dict.fromkeys(name for pair in PAIRS for name in pair), *BESIDE)
NEEDED = (
    "the field 'messages', or 'question' and 'answer', or 'prompt' and 'completion' or 'response', "
    "or 'instruction' and 'output', or 'conversations'"
)

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}

# For a tokenizer without a template of its own: plain words, since a model that has never seen a chat has no
# tokens for its turns. The answer and the end-of-text token are what is learnt.
CHAT_TEMPLATE = (
    "{{- bos_token if bos_token }}"
    "{%- if tools %}{{- 'Tools: ' + tools | tojson + '\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- message['role'] | capitalize }}:"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- ' ' + message['content'] | trim }}"
    "{%- if message['tool_calls'] %}{{- ' ' + message['tool_calls'] | tojson }}{%- endif %}"
    "{{- eos_token }}{%- endgeneration %}"
    "{%- else %}"
    "{{- ' ' + message['content'] | trim + '\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)


@dataclass(frozen=True)
class Conversation:
    """Messages with what a template may use beside them."""

    messages: list[Message]
    """With `role` and `content` (a text) and what else the row has: `tool_calls`, `reasoning_content`..."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the template: `tools`, `documents`, those of `chat_template_kwargs`."""
    prompt: int = 1
    """The number of messages that are not learnt, whoever speaks: an opening one is nobody's answer."""
    where: str = field(default="a conversation", compare=False)
    """File and line or row, for what is wrong with it."""

    @property
    def answers(self) -> list[int]:
        """Positions of the messages that are learnt: the assistant's, but for those whose `weight` is 0."""
        return [
            position
            for position, message in enumerate(self.messages)
            if position >= self.prompt and message["role"] == "assistant" and message.get("weight", 1)
        ]

    def first(self, count: int, *, prompt: int | None = None) -> "Conversation":
        """Its first messages, of which all before `prompt` are not learnt."""
        prompt = self.prompt if prompt is None else prompt
        return replace(self, messages=self.messages[:count], prompt=prompt)


def conversation_of(row: Row, column: str | None = None) -> Conversation | None:
    """The conversation in a row; None if its fields are there and null.

    Args:
        row: see the head of this file for its forms.
        column: the field of its messages, if it is called otherwise.

    Raises:
        ValueError: the row is none, or has parts that are not text (images, sound); names file and row.
    """
    value, where = row
    if isinstance(value, str):
        raise ValueError(f"{where}: a text, not an object with fields")
    options: dict[str, Any] = dict(_parsed(value.get("chat_template_kwargs"), where) or {})
    tools = _parsed(value.get("tools"), where)
    if not tools and (functions := _parsed(value.get("functions"), where)):
        tools = [{"type": "function", "function": function} for function in functions]
    if tools:
        if not isinstance(tools, list):
            raise ValueError(f"{where}: field 'tools' is not a list but {type(tools).__name__}")
        options["tools"] = tools
    if value.get("documents"):
        options["documents"] = value["documents"]

    for name in (column, *LISTS):
        if name is None or name not in value:
            continue
        if value[name] is None or value[name] == []:
            return None
        messages = _messages(_parsed(value[name], where), where, name)
        return Conversation(_opened(value, messages, where), options, where=where)
    for ask, reply in PAIRS:
        if ask not in value or reply not in value:
            continue
        if value[ask] is None or value[reply] is None:
            return None
        if isinstance(value[ask], list) and isinstance(value[reply], list):
            prompt = _messages(value[ask], where, ask)
            messages = prompt + _messages(value[reply], where, reply)
            return Conversation(messages, options, max(len(prompt), 1), where)
        question, answer = (_text(value[name], where, name) for name in (ask, reply))
        if ask == "instruction":
            more = value.get("input") or value.get("context")
            question = f"{question}\n{_text(more, where, 'input')}" if more else question
        messages = [
            *_history(value.get("history"), where),
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        messages = _opened(value, messages, where)
        return Conversation(messages, options, len(messages) - 1, where)
    raise ValueError(f"{where}: needs {NEEDED}; it has: {', '.join(map(str, value))}")


def is_conversation(row: Row) -> bool:
    """Whether a row has the fields of one."""
    value = row.value
    return isinstance(value, dict) and (
        any(name in value for name in LISTS) or any(ask in value and reply in value for ask, reply in PAIRS)
    )


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{name}' is not text but {type(value).__name__}")
    return value


def _parsed(value: Any, where: str) -> Any:
    """Lists and objects that a file without them keeps as JSON; anything else as it is, nothing as None."""
    if not isinstance(value, str):
        return value or None
    if not value.lstrip().startswith(("[", "{")):
        return value if value.strip() else None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}): {value[:40]!r}") from None


def _opened(row: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    """With the system prompt that a row may have beside its messages."""
    if not row.get("system") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(row["system"], where, "system")}, *messages]


def _history(turns: Any, where: str) -> Iterator[Message]:
    for turn in turns or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError(f"{where}: field 'history' is not a list of questions with their answers")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            yield {"role": role, "content": _text(content, where, "history")}


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: field '{name}' is not a list but {type(value).__name__}")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    fields = _without_nulls(value)
    if "from" in fields and "role" not in fields:
        fields = _from_sharegpt(fields, where)
    if isinstance(fields.get("function_call"), dict):  # what tool calls were before there could be several
        fields["tool_calls"] = [{"type": "function", "function": fields.pop("function_call")}]
    if isinstance(fields.get("tool_calls"), list):
        fields["tool_calls"] = [_tool_call(call, where) for call in fields["tool_calls"]]
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    if "content" not in fields and "tool_calls" in fields:
        fields["content"] = ""
    if isinstance(fields.get("content"), list):
        fields["content"] = "".join(_part(part, where) for part in fields["content"])
    if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
        raise ValueError(f"{where} is not an object with text in 'role' and 'content'")
    return fields


def _without_nulls(value: Any) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else {}


def _from_sharegpt(fields: dict[str, Any], where: str) -> Message:
    speaker, value = fields.pop("from"), fields.pop("value", None)
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{where} is from '{speaker}', which is none of {', '.join(SHAREGPT_ROLES)}")
    message = {"role": SHAREGPT_ROLES[speaker], "content": value, **fields}
    if speaker == "function_call":
        calls = _parsed(value, where)
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return message


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """With its arguments as an object, as templates expect them, where they are one written as text."""
    call = _without_nulls(call)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a tool call without the name of a function")
    if isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _parsed(function["arguments"], where) or {}}
    return {**call, "function": function} if "function" in call else function


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{where} has a part of the type '{kind}': only text can be read")


def template_of(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """The model's chat template, or CHAT_TEMPLATE for want of one."""
    if not tokenizer.chat_template:
        return CHAT_TEMPLATE
    return tokenizer.get_chat_template(tools=options.get("tools"))


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the model's chat template writes it, special tokens included.

    A tokenizer without a template has CHAT_TEMPLATE.

    Raises:
        ValueError: the template refuses the conversation, or leaves its tools or tool calls out; names file
            and row, and what the template said.
    """
    text: str = apply_template(conversation, tokenizer)
    for what, bare in _without_tools(conversation):
        if _ignores(bare, text, tokenizer):
            raise ValueError(
                f"{conversation.where}: the model's chat template has no place for {what}: "
                "take one that has, or take them out of the data"
            )
    return text


def _ignores(bare: Conversation, text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation with something left out has the same text."""
    try:
        return bool(apply_template(bare, tokenizer) == text)
    except ValueError:  # it cannot do without
        return False


def apply_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, **how: Any) -> Any:
    """`tokenizer.apply_chat_template` with all that a conversation has; `how` are more of its arguments.

    Raises:
        ValueError: the template refuses the conversation.
    """
    how = {"tokenize": False, "chat_template": template_of(tokenizer, conversation.options), **how}
    how |= conversation.options
    try:
        try:
            return tokenizer.apply_chat_template(conversation.messages, **how)
        except TypeError:  # some templates write the arguments of a call as they are: they want a text
            return tokenizer.apply_chat_template(_arguments_as_text(conversation.messages), **how)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{conversation.where}: the model's chat template refuses this conversation ({reason})"
        ) from None


def _without_tools(conversation: Conversation) -> Iterator[tuple[str, Conversation]]:
    messages, options = conversation.messages, conversation.options
    if any("tool_calls" in message for message in messages):
        bare = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        yield "tool calls", replace(conversation, messages=bare)
    if options.get("tools"):
        rest = {name: value for name, value in options.items() if name != "tools"}
        yield "tools", replace(conversation, options=rest)


def _arguments_as_text(messages: list[Message]) -> list[Message]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
