"""A decoder of which one block at a time holds weights.

The model's own code embeds the tokens and makes each block's arguments (masks differ between layers with
and without a sliding window), so that nothing here knows a family's masks or positions: the blocks'
`forward` is replaced for a moment by one that writes down what it is called with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateurs.anatomy import family_of
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config, refuse_quantised
from secateurs.checkpoint.names import skeleton_of


class Call(NamedTuple):
    """What a block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass that has shown what was wanted
    pass


class BlockwiseModel:
    """The skeleton of a checkpoint's model: weights on the meta device until asked for.

    Args:
        checkpoint: the model's files. Names that a wrapper left prefixes in are put right there.
        device: where materialised parts live and run.

    Attributes:
        dtype: what is computed in: config.json's, or without one there that of the first block's weights,
            whatever other tensors are stored in. Weights that transformers keeps in float32 are in float32.

    Raises:
        ValueError: the configuration is none that transformers knows, of no supported family, or the
            checkpoint lacks a tensor that the model has or holds it in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        from accelerate import init_empty_weights

        self.checkpoint, self.device = checkpoint, device
        refuse_quantised(checkpoint, compressed=True)
        self.config = read_config(checkpoint)
        self.family = family_of(self.config)
        skeleton = skeleton_of(checkpoint)
        self._prefix = skeleton.base_model_prefix + "."
        self._stored = self._names_in_files(skeleton)
        # Not of any tensor in the block: old GPT-2 and NeoX files hold boolean masks there.
        first = self.stored_name(f"{self.family.blocks}.0.{self.family.groups[0][0]}.weight")
        named: Any = self.config.dtype
        self.dtype: torch.dtype = named or checkpoint.load([first])[first].dtype
        # The buffers (rotary frequencies) are computed, not stored: they must be real from the start.
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, trust_remote_code=False
            )
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)
        self.calls: list[Call] = []

    def _names_in_files(self, skeleton: PreTrainedModel) -> dict[str, str]:
        """What is loaded under the base model, parameters and persistent buffers -> its name in the files.

        The head is never run, so it is never read, unless the embedding is stored by its name. A buffer that
        the model can do without, and the files do, stays as the model computed it.
        """
        tied = dict(skeleton.all_tied_weights_keys)
        tied |= {source: target for target, source in tied.items()}
        buffers = {name for name, _ in skeleton.named_buffers()}
        stored = {}
        for name in skeleton.state_dict():
            if name.startswith(self._prefix):
                found = self._find(name) or self._find(tied.get(name, name))
                if found is not None:
                    stored[name] = found
                elif name not in buffers:
                    raise ValueError(f"'{self.checkpoint.folder}' holds no tensor '{name}'")
        return stored

    def _find(self, name: str) -> str | None:
        for candidate in (name, name.removeprefix(self._prefix), self._prefix + name):
            if candidate in self.checkpoint.file_of:
                return candidate
        return None

    def stored_name(self, name: str) -> str:
        """A parameter's name in the files, which may lack or add the base model's prefix (GPT-2, OPT)."""
        found = self._stored.get(name) or self._find(name)
        if found is None:
            raise ValueError(f"'{self.checkpoint.folder}' holds no tensor '{name}'")
        return found

    def block_tensors(self, index: int) -> list[str]:
        """Names in the files of all that is stored under a block, also what its code does not read."""
        path = f"{self.family.blocks}.{index}."
        prefixes = (path, path.removeprefix(self._prefix), self._prefix + path)
        return sorted(name for name in self.checkpoint.file_of if name.startswith(prefixes))

    @contextmanager
    def block(self, index: int, weights: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Materialise a block for a while.

        Args:
            index: which block.
            weights: its tensors by their names in the files; None reads them from the checkpoint.
        """
        path = f"{self.family.blocks}.{index}."
        with self._materialised([name for name in self._stored if name.startswith(path)], weights):
            yield self.blocks[index]

    @contextmanager
    def _materialised(self, names: list[str], weights: dict[str, Tensor] | None = None) -> Iterator[None]:
        stored = {name: self._stored[name] for name in names}
        tensors = self.checkpoint.load(stored.values()) if weights is None else weights
        before = {name: self._get(name) for name in names}
        for name in names:
            # A copy even where device and dtype are right: in a file tensors lie at any address, and by where
            # its operands lie a product may round differently. A resumed run must not depend on that.
            self._put(name, tensors[stored[name]].to(self.device, self._dtype(name), copy=True))
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

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        setattr(
            module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
        )

    @torch.no_grad()
    def embed(self, tokens: Tensor, *, batch_size: int) -> list[Tensor]:
        """Run the model up to its first block, and note in `calls` what each block is called with.

        Args:
            tokens: (samples, length) ids; all of one length and unpadded, so that a block's arguments are
                the same for every batch.
            batch_size: sequences run at once.

        Returns:
            The first block's input, a (batch, length, hidden) tensor on the device for each batch.
        """
        self.calls = []
        hidden: list[Tensor] = []

        def note(states: Any, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            self.calls.append(Call(args, kwargs))
            if len(self.calls) == len(self.blocks):
                raise _Enough
            # A tuple suits a model that unpacks its blocks' output and one that passes it on alike.
            return (states,)

        def keep(states: Tensor, *args: Any, **kwargs: Any) -> None:
            hidden.append(states)
            raise _Enough

        def run(ids: Tensor, forward: Any) -> None:
            for block in self.blocks:
                block.forward = forward
            try:
                self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
            except _Enough:
                pass
            finally:
                for block in self.blocks:
                    del block.forward

        outside = [name for name in self._stored if not name.startswith(self.family.blocks + ".")]
        with self._materialised(outside):
            run(tokens[:1], note)
            for batch in tokens.split(batch_size):
                run(batch, keep)
        return hidden

    @torch.no_grad()
    def run(self, index: int, states: Tensor) -> Tensor:
        """A materialised block's output for (batch, length, hidden) states."""
        output = self.blocks[index](states, *self.calls[index].args, **self.calls[index].kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run_with(self, index: int, states: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The same with other parameters, by their names in the block; gradients flow to them."""
        call = self.calls[index]
        output = torch.func.functional_call(self.blocks[index], parameters, (states, *call.args), call.kwargs)
        return output[0] if isinstance(output, tuple) else output
