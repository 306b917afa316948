"""Training steps without the padding of a batch.

Conversations are of all lengths: of a batch of eight from GSM8K a third is padding, which costs as much as
tokens do. Here the tokens of a batch go through the model in one row, sequence by sequence, each attending to
itself alone, and the last states come back to where they were: loss and gradients are those of the padded
batch. It is what is known as padding-free training, without kernels of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from secateurs.training.calls import WORTH, OtherWay, counts_of, proven_way
from secateurs.training.head import IGNORED
from secateurs.training.rows import AttentionInBlocks, attention_in_blocks

ROW = 4096
"""Tokens of several sequences in one row at most: its mask is that number squared."""


@contextmanager
def without_padding(model: nn.Module) -> Iterator[bool]:
    """Within, a model on a CPU whose batches are padded on the right does not compute the padding.

    States and logits of padding are of no meaning, as before. Nothing is done where a batch has little
    padding or a label for it, and where keys and values, positions of one's own or more than the last states
    are asked for. It is proved first, on a few tokens, that loss and gradients are the model's own; if not
    (states that run on from token to token, attention by other kernels than torch's), nothing changes.

    Args:
        model: a decoder whose parameters are whole, or its wrapping (DDP, PEFT). Not to be compiled: sizes
            change from batch to batch. Backward passes belong within, too.

    Yields:
        Whether it does.
    """
    with (
        attention_in_blocks() as attention,
        proven_way(model, partial(_Joined, attention), _joined) as joined,
    ):
        yield joined is not None


class _Joined(OtherWay):
    """By all tokens in one row, or in several."""

    def __init__(self, attention: AttentionInBlocks, decoder: Any, inner: Any) -> None:
        super().__init__(decoder, inner)
        self.attention = attention

    def output_of(self, call: dict[str, Any], labels: Tensor | None) -> Any:
        batch = self.batch(call)
        if batch is None or call.get("past_key_values") is not None or self._keeps_states(call):
            return None
        ids, mask = batch
        counts = counts_of(mask, labels) if ids.device.type == "cpu" else None
        if counts is None or int(counts.sum()) > WORTH * ids.numel() or self._is_noisy():
            return None
        call = {name: value for name, value in call.items() if name not in ("labels", "input_ids")}
        call |= {"attention_mask": None, "use_cache": False}
        there, places = mask != 0, torch.arange(ids.shape[1]).expand(ids.shape)
        found = []
        for some in _rows(counts.tolist()):
            of_row = (each[some][there[some]][None] for each in (ids, places))
            output = self.own(**call | dict(zip(("input_ids", "position_ids"), of_row, strict=True)))
            found.append(output.last_hidden_state[0])
        states = torch.cat(found)
        whole = states.new_zeros(*ids.shape, states.shape[-1])
        output.last_hidden_state = whole.index_put(there.nonzero(as_tuple=True), states)
        return output

    def _keeps_states(self, call: dict[str, Any]) -> bool:
        """Whether keys and values are asked for; in training only who says so wants them."""
        config = self.decoder.config.get_text_config(decoder=True)
        by_itself = getattr(config, "use_cache", False) and not self.decoder.training
        asked = call.get("use_cache")
        return bool(by_itself if asked is None else asked)

    def _is_noisy(self) -> bool:
        """Whether embeddings get noise in training, as much as the length of a row says (NEFTune)."""
        embedding = self.decoder.get_input_embeddings()
        return self.decoder.training and hasattr(embedding, "neftune_noise_alpha")

    def proved(self) -> bool:
        """And that it costs what the sequences cost: what others attend by would compute what is hidden."""
        self.attention.rows = self.attention.wholes = 0
        return super().proved() and self.attention.rows > 0 and not self.attention.wholes

    def paired(
        self, own: Tensor, found: Tensor, follows: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        in_a_row = found.shape[:2] == (1, int(there.sum()))
        return (own[there], found[0]) if in_a_row else None

    def keeps_apart(self, call: dict[str, Any]) -> bool:
        """Exactly: what is small where weights are new may grow."""
        sequences = torch.arange(len(call["labels"]), device=call["labels"].device)[:, None]
        rows = sequences.expand(call["labels"].shape)[call["attention_mask"] != 0]
        for number in range(len(sequences)):
            labels = call["labels"].where(sequences == number, IGNORED)
            _, gradient = self.learnt({**call, "labels": labels})
            if gradient[0, rows != number].any():
                return False
        return True


def _rows(counts: list[int]) -> Iterator[slice]:
    """Which sequences share a row, in their order."""
    begin = tokens = 0
    for number, count in enumerate(counts):
        if number > begin and tokens + count > ROW:
            yield slice(begin, number)
            begin, tokens = number, 0
        tokens += count
    yield slice(begin, len(counts))


_joined: WeakKeyDictionary[nn.Module, _Joined] = WeakKeyDictionary()
"""What changes a decoder's calls at the moment."""
