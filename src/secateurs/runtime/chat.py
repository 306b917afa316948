"""A conversation with a dense or a compressed model, in a terminal or line by line."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.cache_utils import DynamicLayer

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.config import quiet, read_config
from secateurs.runtime.generate import Pace, check_text, ends_of, positions_of
from secateurs.runtime.load import load_model
from secateurs.runtime.settings import ChatSettings
from secateurs.settings import takes
from secateurs.text import Conversation, load_tokenizer
from secateurs.text.conversations import Message, apply_template
from secateurs.text.tokenising import ids_of

NEXT = "User:"
"""What a model without a chat template goes on with after its answer, in the template that it has instead."""

HELP = "/reset forgets the conversation; /quit, or the end of the input, ends it; Ctrl-C stops an answer."


class Chat:
    """A model and what was said so far.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.
        settings: of the conversation.

    Raises:
        ValueError: the model is broken or has no tokenizer, or its template has no place for a system prompt.
    """

    def __init__(self, model: str | Path, settings: ChatSettings) -> None:
        folder = resolve(model)
        self.settings, self.tokenizer = settings, load_tokenizer(folder)
        self.positions = positions_of(read_config(Checkpoint(folder)))
        check_text(settings.system or "", "the system prompt")
        self.messages: list[Message] = []
        self.read = torch.empty(0, dtype=torch.long)
        self.reset()
        self._ids([*self.messages, {"role": "user", "content": "Hello."}])  # before weights are read
        self.model = load_model(folder, settings.device)

    def reset(self) -> None:
        """Forget what was said; a system prompt stays."""
        self.cache: DynamicCache | None = None
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, question: str, show: Callable[[str], None]) -> Pace:
        """Answer a question, which KeyboardInterrupt ends early; both are part of the conversation from then.

        Tokens are drawn as the model's generation_config.json says, or the likeliest.

        Args:
            question: the user's.
            show: is given the answer's pieces as they come.

        Raises:
            ValueError: the conversation is longer than the model was made for, or the question is no text.
        """
        check_text(question, "the question")
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = self._ids(asked)
        room = self.settings.tokens
        if self.positions is not None:
            room = min(room, self.positions - ids.shape[1])
        if room < 1:
            raise ValueError(
                f"the conversation has {ids.shape[1]} tokens, but the model is made for {self.positions}: "
                "/reset forgets it"
            )
        stop = "" if self.tokenizer.chat_template else NEXT
        stream = _Stream(self.tokenizer, show, self.model.device, stop)
        ends = sorted({*ends_of(self.model), self.tokenizer.eos_token_id} - {None})
        how: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}
        if stop:
            how |= {"stop_strings": [f"\n{stop}"], "tokenizer": self.tokenizer}
        if (cache := self._kept_for(ids)) is not None:
            how["past_key_values"] = cache
        try:
            with quiet():
                output = cast(Any, self.model).generate(
                    ids.to(self.model.device),
                    attention_mask=torch.ones_like(ids).to(self.model.device),
                    max_new_tokens=room,
                    num_beams=1,
                    streamer=stream,
                    return_dict_in_generate=True,
                    **how,
                )
            self._keep(output.sequences.cpu(), output.get("past_key_values"))
        except KeyboardInterrupt:
            stream.end()
        if answer := stream.text.strip():
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return stream.pace

    def _keep(self, sequence: Tensor, cache: Cache | None) -> None:
        """Keys and values of all that was read, for the next question, where they are all that a model keeps,
        none are dropped, and how they are rotated does not change with length: they can be cut where the next
        sequence parts from this one."""
        if not isinstance(cache, DynamicCache) or rotates_by_length(self.model.config):
            return
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            self.cache, self.read = cache, sequence[0, : cache.get_seq_length()]

    def _kept_for(self, ids: Tensor) -> DynamicCache | None:
        """Keys and values of the tokens that these, (1, tokens), begin with. They are kept no longer: an
        answer that is cut off leaves them half written."""
        cache, self.cache = self.cache, None
        both = min(len(self.read), ids.shape[1] - 1)
        same = int((self.read[:both] == ids[0, :both]).long().cumprod(0).sum())
        if cache is None or not same:
            return None
        if same < len(self.read):
            cache.crop(same - len(self.read))
        return cache

    def _ids(self, messages: list[Message]) -> Tensor:
        """A conversation up to the answer's first token, (1, tokens)."""
        conversation = Conversation(messages, where="chat")
        text = apply_template(conversation, self.tokenizer, add_generation_prompt=True)
        return torch.tensor([ids_of(text, self.tokenizer, rendered=True)])


def rotates_by_length(config: PretrainedConfig) -> bool:
    """Whether positions are encoded by how long a sequence has become (dynamic NTK, LongRoPE)."""
    told = json.dumps(config.get_text_config(decoder=True).to_dict(), default=str)
    return any(f'"{kind}"' in told for kind in ("dynamic", "longrope"))


class _Stream(TextStreamer):
    """Shows an answer as its words are complete, without what it stopped at, and takes the time."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None], device: torch.device, stop: str
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.device, self.stop = show, device, stop
        self.text, self.pace, self.start = "", Pace(), time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.pace.count(time.perf_counter() - self.start, self.device)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if stream_end:
            text = text.removesuffix(self.stop).rstrip()
        if not self.text:
            text = text.lstrip()  # templates differ in whether they end with a space
        if text:
            self.text += text
            self.show(text)


@takes(ChatSettings)
def chat(model: str | Path, *, settings: ChatSettings) -> None:
    """Talk with a model: questions from standard input, a line each; answers on standard output.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.

    Raises:
        ValueError: see `Chat`.
    """
    talk, console, beside = Chat(model, settings), Console(), Console(stderr=True)

    def aside(text: str, style: str = "dim") -> None:
        beside.print(Text(text, style), soft_wrap=True)

    terminal = sys.stdin.isatty() and console.is_terminal
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - lines are edited, and earlier ones come back
        aside(f"{model}. {HELP}")
    while True:
        try:
            question = input("\n> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            aside(f"\n{HELP}")
            continue
        if question == "/quit":
            return
        if question == "/reset":
            talk.reset()
            aside("the conversation is forgotten")
        elif question.startswith("/") and " " not in question:
            aside(f"there is no {question}. {HELP}")
        elif question:
            try:
                pace = talk.answer(question, lambda piece: console.out(piece, end="", highlight=False))
            except ValueError as error:
                aside(str(error), "red")
                continue
            console.out()
            aside(str(pace))
