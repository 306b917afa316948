"""Whether blocks can be cut at all: proved on a block of each kind, before anything is trained.

The block runs on half of its units, and once more whole, with what the other half hands to the layer that
reads it silenced. If both give the same, units meet nowhere else in its code, and it knows how many they are
only by what was replaced. Where a norm runs over all heads, or a parameter has an entry for each, they
differ, or the code stumbles: then units of that kind run whole.

The weights are made up, for the proof is about the code. It takes the memory of one block without its
experts, in float32, and nothing of the model itself.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig

from secateurs.anatomy import Anatomy, BlockAnatomy, anatomy_of, skeleton
from secateurs.anatomy.anatomy import fingerprint
from secateurs.anatomy.blocks import note_calls, use_plain_experts
from secateurs.anatomy.trace import Call, Virtual, implemented_here
from secateurs.checkpoint.config import without_deepspeed
from secateurs.training.cutting import Cutting
from secateurs.training.units import KINDS, NAMES, Cut, Kind, cuts_of

TOLERANCE = 1e-3
"""Of what silencing half of the units changes: how far the block that runs without them may be from it."""


@dataclass(frozen=True)
class ProvenCuts:
    """What can be cut of the blocks of a model."""

    anatomy: Anatomy
    blocks: tuple[Mapping[Kind, Cut], ...]
    """For each block; of kinds that it has units of and that can be cut."""

    @property
    def whole(self) -> str | None:
        """What is never cut, in a line; None if all blocks have units of both kinds."""
        count = len(self.blocks)
        parts = []
        for kind in KINDS:
            missing = sum(kind not in cuts for cuts in self.blocks)
            if missing:
                which = f"all {count}" if missing == count else f"{missing} of {count}"
                parts.append(f"{NAMES[kind]} of {which} blocks")
        return f"{' and '.join(parts)} run whole: none can be left out by itself" if parts else None


_known: dict[str, ProvenCuts] = {}


def proven_cuts(config: PretrainedConfig) -> ProvenCuts:
    """What can be cut of a model; derived and proved once for each configuration.

    Raises:
        UnsupportedArchitectureError: the model's blocks cannot be made out.
        ValueError: nothing can be cut in any of its blocks.
    """
    key = fingerprint(config)
    if key not in _known:
        # Some models' own code draws random numbers as they are built.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), without_deepspeed():
            _known[key] = _prove(config)
    proven = _known[key]
    if not any(proven.blocks):
        raise ValueError(
            f"sparse training: neither heads nor channels of {config.model_type!r} can be left out one by "
            "one: train it with omission 0"
        )
    return proven


def _prove(config: PretrainedConfig) -> ProvenCuts:
    anatomy, model = anatomy_of(config), skeleton(config)
    blocks: Any = model.get_submodule(anatomy.path)
    with implemented_here(model):
        calls, _ = note_calls(model, blocks)
    use_plain_experts(model)
    # Attention as the model has it, for some code asks; other kernels than these do not run everywhere.
    if model.config._attn_implementation not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    known: dict[int, Mapping[Kind, Cut]] = {}  # by anatomy: one for blocks of one kind
    cuts = []
    for block, call, inside in zip(blocks, calls, anatomy.blocks, strict=True):
        if id(inside) not in known:
            known[id(inside)] = _proven(block, call, inside)
        cuts.append(known[id(inside)])
    shared = _shared(blocks)
    return ProvenCuts(anatomy, tuple({} if number in shared else cut for number, cut in enumerate(cuts)))


def _shared(blocks: Sequence[nn.Module]) -> set[int]:
    """Blocks of which a parameter is another's too."""
    owners: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for parameter in block.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    return {number for numbers in owners.values() if len(numbers) > 1 for number in numbers}


def _proven(block: nn.Module, call: Call, inside: BlockAnatomy) -> Mapping[Kind, Cut]:
    """What of a block can be cut, all of it at once."""
    experts = {matrix.weight for matrix in inside.matrices.values() if matrix.expert is not None}
    block, possible, proven = _made_up(block, experts), cuts_of(block, inside), dict[Kind, Cut]()
    try:
        before = _run(block, call)  # also for what it hands on to later blocks
        for kind in reversed(KINDS):  # channels first: where both cannot be cut at once, they are more
            if kind in possible:
                expected = _holds(block, call, {**proven, kind: possible[kind]}, before)
                if expected is not None:
                    proven[kind], before = possible[kind], expected
    except Exception:  # of whatever kind the block's code stumbles into
        return {}
    return {kind: proven[kind] for kind in KINDS if kind in proven}


def _made_up(block: nn.Module, virtual: set[str]) -> nn.Module:
    """A copy of a block on the meta device, with numbers in it but for some parameters."""
    block, generator = copy.deepcopy(block), torch.Generator().manual_seed(0)
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if f"{path}.{name}".removeprefix(".") not in virtual:
                values = torch.empty(parameter.shape)
                if values.ndim < 2:
                    values.uniform_(0.5, 1.5, generator=generator)
                else:
                    values.normal_(0, (len(values) / values.numel()) ** 0.5, generator=generator)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                values = torch.rand(buffer.shape, generator=generator) + 0.5
                setattr(module, name, values.to(buffer.dtype))
    return block


@torch.no_grad()
def _run(block: nn.Module, call: Call) -> list[Tensor]:
    """What a block gives for made-up states, and what it leaves in containers that it was given."""
    (states, *args), kwargs = call
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(states.shape, generator=generator)
    with Virtual(generator):
        result = block(states, *args, **kwargs)
    containers = [dict(value) for value in kwargs.values() if isinstance(value, MutableMapping)]
    left = [leaf for leaf in pytree.tree_leaves(containers) if isinstance(leaf, Tensor)]
    return [result[0] if isinstance(result, tuple | list) else result, *left]


def _holds(
    block: nn.Module, call: Call, cuts: Mapping[Kind, Cut], before: list[Tensor]
) -> list[Tensor] | None:
    """What a block gives with half of its units silenced; None if cutting them gives something else."""
    generator = torch.Generator().manual_seed(0)
    kept: dict[Kind, Tensor | None] = dict.fromkeys(KINDS)
    for kind, cut in cuts.items():
        order = torch.rand(cut.units.groups, cut.units.size, generator=generator).argsort(1)
        kept[kind] = order < (cut.units.size + 1) // 2
    with _silenced(block, cuts, kept):
        expected = _run(block, _fresh(call))
    changed = (expected[0] - before[0]).abs().max()
    if not changed.isfinite() or not changed:
        return None
    for in_place in (True, False):
        found = _run_cut(block, call, cuts, kept, in_place=in_place)
        if found is None or [one.shape for one in found] != [other.shape for other in expected]:
            return None
        for one, other in zip(found, expected, strict=True):
            if not (one - other).abs().max() <= TOLERANCE * changed:
                return None
    return expected


def _run_cut(
    block: nn.Module,
    call: Call,
    cuts: Mapping[Kind, Cut],
    kept: dict[Kind, Tensor | None],
    *,
    in_place: bool,
) -> list[Tensor] | None:
    """What a block gives on some of its units alone; None where it does not run."""
    try:
        cutting = Cutting([block], [cuts], "block", in_place=in_place)
        cutting.choose([kept])
        try:
            cutting.engage()
            return _run(block, _fresh(call))
        finally:
            cutting.disengage()
    except Exception:  # of whatever kind the block's code stumbles into
        return None


@contextmanager
def _silenced(
    block: nn.Module, cuts: Mapping[Kind, Cut], kept: Mapping[Kind, Tensor | None]
) -> Iterator[None]:
    """What other units hand to the layer that reads it is zero."""
    hooks = []
    for kind, cut in cuts.items():
        mask = kept[kind]
        assert mask is not None
        factor = mask.flatten()[cut.inputs].float()

        def silence(_: nn.Module, args: tuple[Tensor], factor: Tensor = factor) -> tuple[Tensor]:
            return (args[0] * factor,)

        hooks.append(block.get_submodule(cut.reader).register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fresh(call: Call) -> Call:
    """A call whose containers may be written into."""

    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return copy.copy(value) if isinstance(value, MutableMapping) else value

    return Call(*pytree.tree_map(fresh, tuple(call)))
