"""What `prune` can be told."""

import math
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from torch import Tensor

from secateurs.calibration.sources import Calibration, counts_of, sources_of
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.device import resolve_device
from secateurs.pattern import Pattern, Unstructured, share_of
from secateurs.pruning.allocation.plan import UNIFORM, Allocation, as_pattern
from secateurs.pruning.block.joint import Joint, Target
from secateurs.pruning.block.local import Local, Sequential
from secateurs.pruning.block.refine import passes_for
from secateurs.pruning.block.rounding import Rounded
from secateurs.pruning.methods import Method, describe_method, parse_method
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.solvers.magnitude import Magnitude
from secateurs.recovery.settings import RecoverSettings
from secateurs.settings import InWindows, OnDevice
from secateurs.values import Values, parse_values

PATTERN = "50%"
"""By default."""

REPAIR = 0.5
"""By default: whether none or all of it is better depends on the text and the sparsity."""


class Work(NamedTuple):
    """What sparsellm does to a block where nothing else is said."""

    iterations: int
    """On each MLP."""
    steps: int
    """Of the descent on each block, about."""


Effort = Literal["fast", "default", "best"]

EFFORTS: dict[Effort, Work] = {"fast": Work(0, 64), "default": Work(0, 192), "best": Work(4, 640)}

Told = TypeVar("Told", bound="PruneSettings")

OF_CALIBRATION = ("samples", "length", "seed", "field", "bos", "batch_size", "sequential")
"""What says how calibration text is read and used."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings(InWindows, OnDevice):
    """Prune a pretrained model into a new folder that transformers loads.

    The model is read and written one block at a time, so it may be larger than memory. Interrupt it
    whenever you like: the same command continues where it stopped.

    Example: secateurs prune my-llama --calibration text.txt --pattern 70% --output my-llama-70
    """

    output: str | Path
    """The folder to make. It must not exist, unless this same command began it."""

    calibration: Calibration | None = None
    """Text like that which the model will see: a file or a folder (docs/text.md says of what), a dataset on
    the hub, wikitext2, ptb, c4, or self, which the model writes (self:temperature=0.9). Several are mixed,
    in equal shares or as text.txt=0.25 says. Only magnitude does without. In Python also shares by name, or
    token ids (samples, length)."""

    method: str | Method = "sparsellm"
    """sparsellm, or a local method by itself: magnitude, wanda, sparsegpt or admm. With settings:
    sparsellm:solver=sparsegpt,iterations=2 or sparsegpt:block=64,damping=0.02."""

    pattern: str | float | Pattern | None = None
    """70% (zeros anywhere) or 2:4 (keep two of every four inputs; any n:m). With values also 0%: then what is
    there is rounded; and with experts: then they are dropped. By default 50%."""

    values: str | Values | None = None
    """What the weights that are left are rounded to: int8, int4, int3 or int2, with settings:
    int4:group=128,grid=half (docs/values.md says what these cost and lose). By default they stay as precise
    as the model stores them."""

    embedding: str | Values | None = None
    """What the embedding and the head are rounded to, as with values, once everything else is done: int8
    loses next to nothing. By default they stay as precise as the model stores them."""

    budget: str | int | None = None
    """Instead of pattern and values: how large the model may be once compressed, all weight files together,
    such as 90MB or 1.5GB. Zeros, bits and group are then chosen for each matrix, by how far they move its
    block's output (docs/values.md)."""

    bytes_per_weight: float | None = None
    """The same, as bytes of the pruned matrices over their number of weights, such as 0.4: bfloat16 has 2."""

    experts: str | float = "100%"
    """The share of each block's experts to keep, above 0% and up to 100%: 75% keeps 12 of 16. The others are
    dropped whole, before anything is pruned, and the router is cut to match: those that add least to what
    the block gives for the calibration text (REAP)."""

    effort: Effort = "default"
    """How much work sparsellm spends on each block: fast, default or best (docs/pruning.md has what each
    costs and brings). Iterations given with the method, and --refine, go before."""

    allocation: Allocation = "uniform"
    """How the pattern's zeros are shared out between layers: uniform; sensitivity (most where that moves a
    block's output least); owl (fewer where there are outliers; with settings:
    owl:level=layer,m=5,lambda=0.08). Or, whatever the pattern, a table that maps layer names with wildcards
    to patterns, such as {"*.mlp.*": "70%"}, or the path of a .json file with one."""

    samples: int = 128
    """Calibration sequences."""

    seed: int = 0
    """Of the calibration sample."""

    target: Target | None = None
    """What is aimed at: each layer's own dense output (layer), the dense block's (block) or the dense
    model's (dense), for which o and down make up for what was lost before them. By default dense for
    sparsellm and layer, as published, for the others. Where a model normalises what o and down give (Gemma
    2, OPT-350m), they aim at their own dense outputs in both."""

    repair: float | None = None
    """The share of what earlier blocks lost that the target dense asks o and down to make up for, above 0
    and up to 1. By default 0.5."""

    refine: int | None = None
    """Passes over the calibration text, of sequences longer than 512 tokens over the first 512, in which the
    weights that are left in a pruned block are trained towards the target. By default 0, but for sparsellm,
    unless its target is layer, as many as make about the steps that the effort asks for, and at least one."""

    sequential: Sequential | None = None
    """What a layer's inputs have seen when they are measured: the pruned blocks before it (block, as local
    methods were published), also its own block's pruned attention (sublayer), or every pruned layer
    (linear). Sparsellm and targets beyond the layer always see every layer, and set the biases of what they
    prune anew."""

    recover: int = 0
    """Tokens to train on at the end, towards the dense model's predictions: what `secateurs recover` does
    with the same text. Zeros are held, and of what was rounded the scales are trained. A million is a good
    many; memory has to hold both models."""

    batch_size: int | None = None
    """Sequences run at once. By default 2048 tokens' worth."""

    max_shard_size: str | int = "5GB"
    """The largest a file of weights may be: 500MB, 5GB, or a number of bytes."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit, alone or together."""
        for given, known in ((self.target, Target), (self.sequential, Sequential), (self.effort, Effort)):
            if given is not None and given not in get_args(known):
                raise ValueError(f"'{given}' is none of {', '.join(get_args(known))}")
        solver, share, _ = self.solver, self.share_of_experts, self.wanted
        if self.calibration is None and share < 1:
            raise ValueError("experts are chosen by what they do on calibration text: give some")
        if self.calibration is None and not isinstance(solver, Magnitude):
            raise ValueError(
                "calibration text is needed (a file, a folder, a dataset's name, or self): only magnitude "
                "does without"
            )
        if self.is_bounded:
            self._check_budget()
        if self.samples < 1:
            raise ValueError(f"samples are at least 1, not {self.samples}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length is at least 1, not {self.length}")
        if self.calibration is not None and not isinstance(self.calibration, Tensor):
            counts_of(sources_of(self.calibration), self.samples)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is a number of sequences, not {self.batch_size}")
        if self._beyond_layers:
            if self.sequential not in (None, "linear"):
                raise ValueError(
                    f"sequential '{self.sequential}' does not go with SparseLLM, nor with a target beyond "
                    "the layer: they see all that was pruned before ('linear')"
                )
            if self.calibration is None:
                raise ValueError(f"calibration text is needed for the target '{self.aim}'")
        if self.effort != "default" and not isinstance(solver, SparseLLM):
            raise ValueError(f"the effort '{self.effort}' is for sparsellm: other methods have but one")
        if self.repair is not None and self.aim != "dense":
            raise ValueError(f"repair goes with the target dense, not with {self.aim}")
        if not 0 < self.share_repaired <= 1:
            raise ValueError(
                f"repair is a share above 0 and up to 1, not {self.repair} (for 0, set target to block)"
            )
        if self.refine is not None and (not isinstance(self.refine, int) or self.refine < 0):
            raise ValueError(f"refine is a number of passes, not {self.refine}")
        if self.refine and self.aim == "layer":
            raise ValueError("refine goes towards what a block ought to give: set target to block or dense")
        if self.recover < 0:
            raise ValueError(f"recover is a number of tokens, not {self.recover}")
        if self.recover:
            if self.calibration is None:
                raise ValueError("calibration text is needed to recover")
            self.recovery("", self.output)
        if self.calibration is None:
            defaults = {field.name: field.default for field in fields(self)}
            idle = [name for name in OF_CALIBRATION if getattr(self, name) != defaults[name]]
            if idle:
                warnings.warn(f"without calibration text nothing comes of {', '.join(idle)}", stacklevel=5)
        size_in_bytes(self.max_shard_size)
        resolve_device(self.here)

    @property
    def here(self) -> str | None:
        """The device, as torch knows it."""
        return self.device

    @property
    def solver(self) -> Method:
        solver = parse_method(self.method) if isinstance(self.method, str) else self.method
        if isinstance(solver, SparseLLM) and solver.iterations is None:
            return replace(solver, iterations=EFFORTS[self.effort].iterations)
        return solver

    def _check_budget(self) -> None:
        """Raises ValueError for what a budget does not go with."""
        option = "budget" if self.budget is not None else "bytes_per_weight"
        if self.budget is not None and self.bytes_per_weight is not None:
            raise ValueError("budget and bytes_per_weight both say how large the model may be: give one")
        others = {"pattern": self.pattern, "values": self.values}
        for name in (name for name, given in others.items() if given is not None):
            raise ValueError(f"{option} chooses zeros and bits for each matrix: leave {name} out")
        if self.allocation != UNIFORM:
            raise ValueError(f"{option} says itself what each matrix gets: leave the allocation uniform")
        if self.calibration is None:
            raise ValueError(f"{option} goes by what is measured on calibration text: give some")
        if self.budget is not None:
            size_in_bytes(self.budget)
        each = self.bytes_per_weight
        is_number = isinstance(each, int | float) and not isinstance(each, bool)
        if each is not None and not (is_number and 0 < each < math.inf):
            raise ValueError(f"bytes_per_weight is a number above 0, not {self.bytes_per_weight}")

    @property
    def is_bounded(self) -> bool:
        """Whether there is a budget of bytes, which patterns and grids follow from."""
        return self.budget is not None or self.bytes_per_weight is not None

    @property
    def wanted(self) -> Pattern:
        """The pattern, which an allocation shares out."""
        pattern = PATTERN if self.pattern is None else self.pattern
        return as_pattern(pattern, none=self.share_of_experts < 1 or self.rounds)

    @property
    def leaves_layers(self) -> bool:
        """Whether no layer is to be pruned or rounded: experts are dropped, or tables rounded, and that is
        all."""
        nothing = self.wanted == Unstructured(0.0) and self.grid is None
        return nothing and not self.is_bounded and self.allocation == UNIFORM

    @property
    def grid(self) -> Values | None:
        """Of the values; None leaves them as they are."""
        return _grid(self.values)

    @property
    def grid_of_tables(self) -> Values | None:
        """Of the embedding and the head; None leaves them as they are."""
        return _grid(self.embedding)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        return self.grid is not None or self.grid_of_tables is not None

    @property
    def share_of_experts(self) -> float:
        """To keep."""
        share = share_of(str(self.experts))
        if share is None or not 0 < share <= 1:
            raise ValueError(
                f"experts are a share to keep, above 0% and up to 100%, not '{self.experts}': give 75%, say"
            )
        return share

    @property
    def aim(self) -> Target:
        """The target, where none was given the method's own."""
        return self.target or ("dense" if isinstance(self.solver, SparseLLM) else "layer")

    @property
    def _beyond_layers(self) -> bool:
        return isinstance(self.solver, SparseLLM) or self.aim != "layer"

    @property
    def seen(self) -> Sequential:
        """What a layer's inputs have seen; see `sequential`."""
        return "linear" if self._beyond_layers else self.sequential or "block"

    @property
    def share_repaired(self) -> float:
        return REPAIR if self.repair is None else self.repair

    def resolved(self: Told, samples: int, length: int) -> Told:
        """With the passes of refinement that suit so many calibration sequences of so many tokens."""
        if self.refine is not None:
            return self
        refines = isinstance(self.solver, SparseLLM) and self.aim != "layer"
        passes = passes_for(EFFORTS[self.effort].steps, samples, length) if refines else 0
        return replace(self, refine=passes)

    @property
    def pruner(self) -> Joint | Local | Rounded:
        """How a block is pruned."""
        if self.grid is None and not self.is_bounded:
            return self._pruner
        return Rounded(self._pruner, bounded=self.is_bounded)

    @property
    def _pruner(self) -> Joint | Local:
        solver, refine = self.solver, self.refine or 0
        if isinstance(solver, SparseLLM):
            return Joint(solver, self.aim, self.share_repaired, refine)
        if self.aim != "layer":
            return Joint(SparseLLM(solver, iterations=0), self.aim, self.share_repaired, refine)
        return Local(solver, self.seen)

    def recovery(self, model: str | Path, output: str | Path) -> RecoverSettings:
        """What the last phase is told; ValueError for what does not suit it."""
        assert self.calibration is not None
        return RecoverSettings(
            output=output,
            towards=model,
            calibration=self.calibration,
            tokens=self.recover,
            seed=self.seed,
            length=self.length,
            field=self.field,
            bos=self.bos,
            device=self.here,
            max_shard_size=self.max_shard_size,
        )

    def record(self) -> dict[str, Any]:
        """What was chosen, defaults filled in, for `secateurs.json`.

        Text and allocation are left out: a run describes them as it finds them. So is recovery, which has an
        entry of its own.
        """
        return {
            "method": describe_method(self.solver),
            **({} if self.is_bounded else {"pattern": str(self.wanted)}),
            **({} if self.budget is None else {"budget": size_in_bytes(self.budget)}),
            **({} if self.bytes_per_weight is None else {"bytes_per_weight": self.bytes_per_weight}),
            **({} if self.grid is None else {"values": self.grid.describe()}),
            **({} if self.grid_of_tables is None else {"embedding": self.grid_of_tables.describe()}),
            **({"experts": self.share_of_experts} if self.share_of_experts < 1 else {}),
            "target": self.aim,
            "repair": self.share_repaired if self.aim == "dense" else None,
            "refine": self.refine or 0,
            "sequential": self.seen,
            "max_shard_size": size_in_bytes(self.max_shard_size),
        }


def _grid(values: str | Values | None) -> Values | None:
    if values is None or isinstance(values, Values):
        return values
    if not isinstance(values, str):
        raise ValueError(f"values are a name such as int4 or int4:group=32, not {values!r}")
    return parse_values(values)
