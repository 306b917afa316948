"""A decoder of which one block at a time holds weights.

The model's own code embeds the tokens and makes each block's arguments (masks differ between layers with
and without a sliding window, some models look up an embedding for each block), so that nothing here knows a
family's masks or positions: the blocks' `forward` is replaced for a moment by one that writes down what it is
called with.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.anatomy import UnsupportedArchitectureError, anatomy_of, skeleton
from secateurs.anatomy.blocks import (
    RESULTS,
    decoder_of,
    states_of,
    use_plain_experts,
    with_computed_buffers,
)
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config, refuse_quantised
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.pieces import Piece, assemble, pieces_of, take_apart


@dataclass
class Batch:
    """Calibration sequences on their way through the blocks."""

    states: Tensor
    """What the next block is given: (sequences, length, hidden), or with the sequences in another place."""
    at: Sequence[int]
    """Which of the calibration sequences these are."""
    axis: int = 0
    """Which of the states' dimensions is that of the sequences."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What blocks have left for later ones (keys and values, where several blocks use the same)."""
    is_head: bool = False
    """Whether these are only what the sequences begin with (`BlockwiseModel.head`)."""

    def split(self) -> list["Batch"]:
        """Each sequence by itself."""
        return [
            Batch(states, [at], self.axis, pytree.tree_map(partial(_one, i), self.shared), self.is_head)
            for i, (states, at) in enumerate(zip(self.split_like(self.states), self.at, strict=True))
        ]

    def split_like(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts that belong to each sequence of a tensor laid out as the states are."""
        return tensor.split(1, dim=self.axis)

    @staticmethod
    def joined(parts: Sequence["Batch"]) -> "Batch":
        """The opposite of `split`."""
        axis = parts[0].axis
        return Batch(
            torch.cat([part.states for part in parts], dim=axis),
            [at for part in parts for at in part.at],
            axis,
            pytree.tree_map(_joined, *(part.shared for part in parts)),
            parts[0].is_head,
        )


def _one(i: int, value: Any) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) else value


def _joined(first: Any, *rest: Any) -> Any:
    return torch.cat([first, *rest]) if isinstance(first, Tensor) else first


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass that has shown what was wanted
    pass


class BlockwiseModel:
    """The skeleton of a checkpoint's model: weights on the meta device until asked for.

    Args:
        checkpoint: the model's files. Names that a wrapper left prefixes in are put right there.
        device: where materialised parts live and run.

    Attributes:
        anatomy: what its blocks are made of.
        text_config: the configuration of the decoder, in a model of images and text a part of the whole.
        pieces: what parameters and stored buffers are made of in the files, by their names in the model.
        length: of the sequences that were embedded, in tokens.
        head: what sequences begin with, as blocks may be run on it, if `embed` was asked for it.
        dtype: what is computed in: config.json's, or without one there that of the first block's weights,
            whatever other tensors are stored in. Weights that transformers keeps in float32 are in float32.

    Raises:
        ValueError: the configuration is none that transformers knows, its blocks cannot be run one by one, or
            the checkpoint lacks a tensor that the model has or holds it in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        refuse_quantised(checkpoint, compressed=True)
        self.config = read_config(checkpoint)
        self.text_config: Any = self.config.get_text_config(decoder=True)
        whole = skeleton_of(checkpoint)
        self.pieces = pieces_of(checkpoint, whole)
        self.anatomy = anatomy_of(self.config)
        self.path = self.anatomy.path
        # Not of any tensor in the block: old GPT-2 and NeoX files hold boolean masks there.
        first = next((group[0].weight for block in self.anatomy.blocks for group in block.groups), None)
        if first is None:
            raise UnsupportedArchitectureError(
                f"'{checkpoint.folder}' ({self.config.model_type}) has no matrices that can be pruned"
            )
        index = next(i for i, block in enumerate(self.anatomy.blocks) if block.groups)
        named: Any = self.text_config.dtype or self.config.dtype
        self.dtype: torch.dtype = named or self.pieces[f"{self.path}.{index}.{first}"][0].dtype
        self.model = skeleton(self.config, self.dtype)
        use_plain_experts(self.model)
        self.decoder = decoder_of(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder)
        self._prefix = f"{prefix}." if prefix else ""
        for name, buffer in list(self.model.named_buffers()):
            if buffer.is_meta and name not in self.pieces:  # the model can do without, and the files do
                self._put(name, torch.zeros_like(buffer, device="cpu"))
        with_computed_buffers(self.model)
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                self._put(name, buffer.to(device))
        blocks: Any = self.model.get_submodule(self.path)
        self.blocks: nn.ModuleList = blocks
        self._calls: list[_Calls] = []
        self.length = 0
        self.head: Head | None = None

    def parameters_of(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a block holds, as it is stored: by its names within the block.

        Args:
            index: which block.
            tensors: by their names in the files; those that are not among them are read from the checkpoint.
        """
        inside = self._inside(index)
        stored = {piece.stored for pieces in inside.values() for piece in pieces}
        known = dict(tensors or {})
        known |= self.checkpoint.load(sorted(stored - known.keys()))
        return {name: assemble(pieces, known) for name, pieces in inside.items()}

    def stored_form(self, index: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The opposite of `parameters_of`: tensors by their names in the files."""
        stored: dict[str, Tensor] = {}
        for name, pieces in self._inside(index).items():
            take_apart(parameters[name].cpu(), pieces, stored)
        return stored

    def _inside(self, index: int) -> dict[str, tuple[Piece, ...]]:
        path = f"{self.path}.{index}."
        return {
            name.removeprefix(path): pieces for name, pieces in self.pieces.items() if name.startswith(path)
        }

    def block_tensors(self, index: int) -> list[str]:
        """Names in the files of all that is stored under a block, also what its code does not read."""
        path = f"{self.path}.{index}."
        prefixes = tuple(path[dot:] for dot in (0, *(i + 1 for i, c in enumerate(self._prefix) if c == ".")))
        read = {piece.stored for pieces in self._inside(index).values() for piece in pieces}
        others = {name for pieces in self.pieces.values() for name in {piece.stored for piece in pieces}}
        beside = {name for name in self.checkpoint.file_of if name.startswith(prefixes)} - others
        return sorted(read | beside)

    @contextmanager
    def block(self, index: int, parameters: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Materialise a block for a while.

        Args:
            index: which block.
            parameters: what `parameters_of` gives; None reads them from the checkpoint.
        """
        path = f"{self.path}.{index}."
        held = self.parameters_of(index) if parameters is None else parameters
        with self._materialised({path + name: tensor for name, tensor in held.items()}):
            yield self.blocks[index]

    @contextmanager
    def _materialised(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: self._get(name) for name in tensors}
        for name, tensor in tensors.items():
            # A copy even where device and dtype are right: in a file tensors lie at any address, and by where
            # its operands lie a product may round differently. A resumed run must not depend on that.
            self._put(name, tensor.to(self.device, self._dtype(name), copy=True))
        try:
            yield
        finally:
            for name, tensor in before.items():
                self._put(name, tensor)

    def _dtype(self, name: str) -> torch.dtype:
        """What a weight is computed in, as transformers has it: buffers and a few others in float32."""
        present, half = self._get(name), self.dtype in (torch.float16, torch.bfloat16)
        kept = set(self.model._keep_in_fp32_modules_strict or ()) if half else set()
        if self.dtype == torch.float16:
            kept |= set(self.model._keep_in_fp32_modules or ())
        if any(part in kept for part in name.split(".")):
            return torch.float32
        return self.dtype if isinstance(present, nn.Parameter) else present.dtype

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _get(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self._owner(name), name.rpartition(".")[2])
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name), name.rpartition(".")[2]
        setattr(
            module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
        )

    @torch.no_grad()
    def embed(self, tokens: Tensor, *, batch_size: int, head: int | None = None) -> list[Batch]:
        """Run the model up to its first block, and note what each block is called with for each sequence.

        Args:
            tokens: (samples, length) ids; all of one length and unpadded.
            batch_size: sequences run at once.
            head: also note it for so many first tokens of each, where they are more and the states have one
                place for each. What differs between sequences is then held for both.

        Returns:
            The first block's input, on the device.

        Raises:
            UnsupportedArchitectureError: with more sequences the blocks' arguments take shapes in which they
                cannot be put together.
        """
        batches: list[Batch] = []
        with self._materialised(self._outside()):
            self._calls, self.head = self._calls_for(tokens), None
            self.length = tokens.shape[1]
            if head is not None and head < tokens.shape[1]:
                self.head = self._head(tokens, head)
            two = self._note(tokens[:1].expand(2, -1), blocks=1)
            one = self._note(tokens[:1], blocks=1)[0][0][0].shape
            axis = next(i for i, size in enumerate(two[0][0][0].shape) if size != one[i])
            first = 0
            for ids in tokens.split(batch_size):
                states = self._note(ids, blocks=1)[0][0][0]
                batches.append(Batch(states, range(first, first + len(ids)), axis))
                first += len(ids)
        return batches

    def _outside(self, *, beyond: bool = False) -> dict[str, Tensor]:
        """What the decoder holds outside of its blocks, as it is stored.

        Args:
            beyond: also what comes after it, but for the head.
        """
        head = self.model.get_output_embeddings() if beyond else None
        others = f"{self.model.base_model_prefix}."
        outside = [
            name
            for name in self.pieces
            if not name.startswith(f"{self.path}.")
            and (
                name.startswith(self._prefix)
                or (beyond and not name.startswith(others) and self._owner(name) is not head)
            )
        ]
        stored = {piece.stored for name in outside for piece in self.pieces[name]}
        tensors = self.checkpoint.load(sorted(stored))
        return {name: assemble(self.pieces[name], tensors) for name in outside}

    @contextmanager
    def to_head(self) -> Iterator[Callable[[Batch], Tensor | None]]:
        """Materialise what is outside of the blocks, for a function that gives what the model's head
        multiplies by, (..., hidden), for a batch whose states are what the last block gave. None if that
        depends on the tokens, or on what other blocks gave, too."""
        given: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            given.append(args[0])
            raise _Enough

        def run(batch: Batch, others: Tensor, token: int) -> Tensor:
            last, other = (RESULTS[self.anatomy.result](each) for each in (batch.states, others))
            for block in self.blocks:
                block.forward = lambda *args, **kwargs: other
            self.blocks[-1].forward = lambda *args, **kwargs: last
            ids = torch.full((len(batch.at), self.length), token, device=self.device)
            with suppress(_Enough):
                self.model(input_ids=ids, use_cache=False)
            return given.pop()

        @torch.no_grad()
        def found(batch: Batch) -> Tensor | None:
            batch = replace(batch, states=batch.states.to(self.device))
            result = run(batch, batch.states, 0)
            return result if torch.equal(result, run(batch, 1 - batch.states, 1)) else None

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with self._materialised(self._outside(beyond=True)):
                yield found
        finally:
            hook.remove()
            for block in self.blocks:
                with suppress(AttributeError):
                    del block.forward

    def _head(self, tokens: Tensor, length: int) -> "Head | None":
        whole, head = (self._note(ids, blocks=1)[0][0][0].shape for ids in (tokens[:1], tokens[:1, :length]))
        places = [axis for axis in range(len(whole)) if whole[axis] != head[axis]]
        if len(places) != 1 or (whole[places[0]], head[places[0]]) != (tokens.shape[1], length):
            return None  # a model may put tokens of its own before the first
        return Head(length, places[0], self._calls_for(tokens[:, :length]))

    def _calls_for(self, tokens: Tensor) -> list["_Calls"]:
        noted = [_Calls(args, kwargs) for args, kwargs in self._note(tokens[:1])]
        for i in range(1, len(tokens)):
            for calls, (args, kwargs) in zip(noted, self._note(tokens[i : i + 1]), strict=True):
                calls.add(args, kwargs)
        two = self._note(tokens[:1].expand(2, -1))
        for calls, (args, kwargs) in zip(noted, two, strict=True):
            calls.check_two(args, kwargs, self.config.model_type)
        return noted

    def _note(
        self, ids: Tensor, *, blocks: int | None = None
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the first blocks, or all, are called with: hidden states first."""
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = states_of(args, kwargs)
            noted.append((args, kwargs))
            if len(noted) == (blocks or len(self.blocks)):
                raise _Enough
            return RESULTS[self.anatomy.result](args[0])

        for block in self.blocks:
            block.forward = note
        try:
            self.decoder(input_ids=ids.to(self.device), use_cache=False)
        except _Enough:
            pass
        finally:
            for block in self.blocks:
                del block.forward
        return noted

    @torch.no_grad()
    def run(self, index: int, batch: Batch, *, keep: bool = False) -> Tensor:
        """A materialised block's output for a batch, of the shape of its states.

        Args:
            index: which block.
            batch: stays as it is.
            keep: but for what the block leaves for later ones.
        """
        args, kwargs = self._call(index, batch).of(batch, batch.shared if keep else dict(batch.shared))
        return states_in(self.blocks[index](batch.states.to(self.device), *args, **kwargs))

    def _call(self, index: int, batch: Batch) -> "_Calls":
        if not batch.is_head:
            return self._calls[index]
        assert self.head is not None
        return self.head.calls[index]

    def push(self, index: int, batch: Batch) -> None:
        """Replace a batch's states by a materialised block's output, where they were."""
        batch.states = self.run(index, batch, keep=True).to(batch.states.device)

    def run_with(self, index: int, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
        """What `run` gives with other parameters, by their names in the block; gradients flow to them."""
        args, kwargs = self._call(index, batch).of(batch, dict(batch.shared))
        return states_in(
            torch.func.functional_call(self.blocks[index], parameters, (batch.states, *args), kwargs)
        )


@dataclass(frozen=True)
class Head:
    """What sequences begin with."""

    length: int
    """In tokens."""
    axis: int
    """Which of the states' dimensions is that of the tokens."""
    calls: list["_Calls"]
    """Of each block."""

    def of(self, batch: Batch) -> Batch:
        """Of the sequences of a batch.

        Raises:
            ValueError: blocks have left something there for later ones, of the whole sequences.
        """
        if batch.shared:
            raise ValueError("what blocks share is not known for a part of the tokens")
        # As a model would have it: some look at it another way.
        return Batch(self.of_tensor(batch.states).contiguous(), batch.at, batch.axis, is_head=True)

    def of_tensor(self, tensor: Tensor) -> Tensor:
        """Of a tensor laid out as the states are."""
        return tensor.narrow(self.axis, 0, self.length)


def states_in(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


class _Calls:
    """What a block is called with beside its hidden states: once where it is the same for all sequences."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._form = pytree.tree_flatten((args[1:], kwargs))
        self._varying: dict[int, list[Tensor]] = {}
        self._repeated: set[int] = set()
        self._count = 1
        # Empty, for blocks to leave things in.
        self._boards = [
            key for key, value in kwargs.items() if isinstance(value, MutableMapping) and not value
        ]

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same call for the next sequence."""
        leaves = pytree.tree_leaves((args[1:], kwargs))
        for i, (first, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            if isinstance(leaf, Tensor) and i not in self._varying and not torch.equal(first, leaf):
                self._varying[i] = [first] * self._count
            if i in self._varying:
                self._varying[i].append(leaf)
        self._count += 1

    def check_two(self, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: str) -> None:
        """See what becomes of arguments that two sequences share a batch in."""
        leaves = pytree.tree_leaves((args[1:], kwargs))
        for i, (first, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            if not isinstance(leaf, Tensor) or leaf.shape == first.shape:
                continue
            if leaf.shape != (2 * first.shape[0], *first.shape[1:]):
                raise UnsupportedArchitectureError(
                    f"unsupported architecture: {architecture!r} calls its blocks with arguments of "
                    f"{tuple(first.shape)} for one sequence and {tuple(leaf.shape)} for two"
                )
            if first.shape[0] == 1:
                self._repeated.add(i)
            elif i not in self._varying:
                self._varying[i] = [first] * self._count

    def of(self, batch: Batch, shared: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call for a batch. Blocks read from `shared` what earlier ones left there, and leave their
        own."""
        leaves = list(self._leaves)
        for i in self._repeated:
            leaves[i] = leaves[i].expand(len(batch.at), *leaves[i].shape[1:])
        for i, values in self._varying.items():
            leaves[i] = torch.cat([values[at] for at in batch.at])
        args, kwargs = pytree.tree_unflatten(leaves, self._form)
        return args, kwargs | dict.fromkeys(self._boards, shared)
