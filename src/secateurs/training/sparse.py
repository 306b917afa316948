"""A training run on subsets of the model that change between optimiser steps."""

import warnings
from collections.abc import Collection
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from secateurs.training.calls import calls_as_ever
from secateurs.training.context import context_length
from secateurs.training.cutting import local
from secateurs.training.frozen import FrozenOptimizer
from secateurs.training.importance import METRICS, WITH_LOSS, Importance, Scores, batch_of, measure, probed
from secateurs.training.ladder import SCHEDULES, Schedule, check_rate, named_schedule
from secateurs.training.omission import Omission, unwrapped
from secateurs.training.rates import Rates, given_rates, measured_rates
from secateurs.training.selection import SELECTIONS, Select, select, share_out
from secateurs.training.units import KINDS, NAMES, Kind, Units, multiple_of, units_kept
from secateurs.training.work import Work
from secateurs.training.zero import FrozenFragments, stepping, zero_of

SMOOTHING = 0.7
"""What an older measurement of importance counts, relative to the one after it."""

PROBE_EVERY = 20
"""Optimiser steps between measurements by default. In fast training (benchmarks/sat_probe_interval.py) a set
that old still keeps, in the worst block, 93 % of the heads' and of the channels' importance that a new one
would, and 97 % or more where it is one step old."""

RATE = 0.5
"""The highest rate by default."""


class SparseTraining:
    """Sparsity-Accelerated Training (arXiv 2406.01392) in a plain PyTorch loop, in three calls.

    Each optimiser step runs every block on the heads and channels that matter most at the moment. What it
    omits has no gradient and does not move. In evaluation mode the model is whole, and at any time its
    `state_dict` and the optimiser's are; between training steps its parameters may be small (see `whole`).

    Example:
        sat = SparseTraining(rate=0.5)
        sat.attach(model, optimizer, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            sat.step()
            optimizer.zero_grad()
        sat.detach()  # the plain model again

    Args:
        rate: highest share of heads and channels that a step omits, in [0, 1); 0.5 if left out. "auto" omits
            that share (or the schedule's peak) of the blocks' multiplications, spread over blocks, heads and
            channels by what the first batch shows (see `secateurs.training.rates`).
        schedule: "ladder" (LORS), "constant", "linear", "cubic", or a schedule, which brings its own rate.
        importance: which units matter (see `secateurs.training.importance.measure`).
        select: "topk", or "sample" without replacement in proportion to importance.
        attention_rate: the highest rate of the heads, if not `rate`.
        mlp_rate: the highest rate of the channels, if not `rate`.
        exempt: indices of blocks that always run whole; negative ones count from the end.
        probe_every: optimiser steps between two measurements of importance, each followed by a new choice.
        across_layers: let layers share the budget of each kind by importance; otherwise each keeps as much.
        seed: of the sampling.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """

    def __init__(
        self,
        rate: float | Literal["auto"] | None = None,
        *,
        schedule: str | Schedule = "ladder",
        importance: Importance = "weighted",
        select: Select = "topk",
        attention_rate: float | None = None,
        mlp_rate: float | None = None,
        exempt: Collection[int] = (),
        probe_every: int = PROBE_EVERY,
        across_layers: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule '{schedule}': choose from {', '.join(SCHEDULES)}")
        self.auto = rate == "auto"
        if self.auto and (attention_rate, mlp_rate) != (None, None):
            raise ValueError("rate 'auto' finds the rates of heads and channels: leave out their own")
        if self.auto and across_layers:
            raise ValueError("rate 'auto' shares out over layers by itself: leave out across_layers")
        own = None if isinstance(schedule, str) else schedule.peak
        if isinstance(rate, str) and not self.auto:
            raise ValueError(f"rate is a number or 'auto', not '{rate}'")
        if rate is None or isinstance(rate, str):
            rate = RATE if own is None else own
        elif own not in (None, rate):
            raise ValueError(f"rate {rate} and a schedule with a peak of {own}: give one of them")
        self._given: dict[Kind, float] = {
            "attention": rate if attention_rate is None else attention_rate,
            "mlp": rate if mlp_rate is None else mlp_rate,
        }
        for value, name in ((rate, "rate"), (attention_rate, "attention_rate"), (mlp_rate, "mlp_rate")):
            if value is not None:
                check_rate(value, name)
        if importance not in METRICS:
            raise ValueError(f"unknown importance '{importance}': choose from {', '.join(METRICS)}")
        if select not in SELECTIONS:
            raise ValueError(f"unknown selection '{select}': choose from {', '.join(SELECTIONS)}")
        if probe_every < 1:
            raise ValueError(f"probe_every is a number of optimiser steps, at least 1, not {probe_every}")
        self.importance, self.how, self.exempt = importance, select, tuple(exempt)
        self.probe_every, self.across_layers, self.seed = probe_every, across_layers, seed
        self._schedule = schedule
        self.attached = False
        self.flops_done = 0.0
        """Spent on forward and backward passes so far, probes included."""
        self.flops_dense = 0.0
        """What plain training would have spent on the same tokens."""

    def attach(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        """Begin: from here on the model's forward passes in training mode are sparse.

        What cannot be cut (see `secateurs.training.proof`) runs whole, and a warning says what.

        Args:
            model: what training calls, or the model inside its wrapping (DDP, torch.compile, FSDP2, PEFT).
            optimizer: a torch optimiser, or accelerate's wrapping of one.
            total_steps: optimiser steps that training will make.

        Raises:
            UnsupportedArchitectureError: the model's blocks cannot be made out.
            ValueError: nothing can be cut in any block, a rate leaves a layer without heads, a block to
                exempt does not exist, the schedule is longer than training, or the model or optimiser is of a
                kind that cannot be sliced.
        """
        if self.attached:  # training that was cut short begins again
            self.detach()
        if isinstance(self._schedule, str):
            self.schedule = named_schedule(self._schedule, max(self._given.values()), total_steps)
        else:
            self.schedule = self._schedule
        if self.schedule.steps > total_steps:
            raise ValueError(
                f"the schedule spans {self.schedule.steps} steps, training makes {total_steps}: "
                "it would be cut off before its end"
            )
        self.model = unwrapped(model)
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        # DDP and FSDP own the parameters, and count on their shapes.
        self.omission = Omission(self.model, in_place=not (sharded or dist.is_initialized()))
        self.peaks: Rates | None = None
        """The highest rate of each block and kind; None while it is still to be measured."""
        given = given_rates(self.omission, self._given, self.exempt)
        if not self.auto:
            self.peaks = given
            self._keep(given)
        whole = self.omission.proven.whole
        if whole and not (dist.is_initialized() and dist.get_rank()):
            warnings.warn(f"sparse training: {whole}", stacklevel=2)
        self.flops_done = self.flops_dense = 0.0
        self.step_number = 0
        """Optimiser steps made."""
        self.kept: list[dict[Kind, Tensor | None]] = [dict.fromkeys(KINDS) for _ in self.omission.blocks]
        """For each block and kind a mask (groups, size) of the units that run; None is all."""
        self.scores: Scores | None = None
        """The importance of each unit, averaged over measurements."""
        self._keeping: list[dict[Kind, int]] | None = None
        self._chosen_at = 0
        self._ready = self._probing = False
        self._losses: list[Tensor] = []
        zero, inner = zero_of(optimizer), stepping(optimizer)
        self._hooks: list[Any] = [
            # Before FSDP's own hook, so that a probe is a forward pass of its own.
            self.model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
            self.model.register_state_dict_pre_hook(lambda *_: self.whole()),
            self.model.register_load_state_dict_pre_hook(lambda *_: self.whole()),
            inner.register_state_dict_pre_hook(lambda *_: self.whole()),
            inner.register_load_state_dict_pre_hook(lambda *_: self.whole()),
            inner.register_step_pre_hook(lambda *_: self._check_losses()),
        ]
        self._frozen = FrozenFragments(zero, self.omission) if zero else FrozenOptimizer(inner, self.omission)
        self._settled = steps = self._frozen.steps  # those of an optimiser that has trained before
        self.counts: list[dict[Kind, Tensor]] = [
            {kind: torch.full((u.groups, u.size), steps) for kind, u in block.units.items()}
            for block in self.omission.blocks
        ]
        """For each block, and kind that it has units of, the optimiser steps that each has run."""
        self._dense = self._work = Work(self.omission, self.model)
        self.attached = True

    def step(self) -> None:
        """Tell that the optimiser has made a step."""
        self.step_number += 1
        self._ready = False

    def detach(self) -> None:
        """End: the plain, dense model and optimiser again."""
        self.attached = False
        self.whole()
        self._frozen.detach()
        for hook in self._hooks:
            hook.remove()

    def whole(self) -> None:
        """Make parameters and optimiser state whole, until the next forward pass in training mode."""
        self.omission.disengage()
        self._frozen.widen()

    @property
    def rate(self) -> float:
        """The omission rate of the current optimiser step."""
        return self.schedule.rate(self.step_number)

    @property
    def rates(self) -> Rates:
        """The same, of each block and kind."""
        share = self.rate / self.schedule.peak if self.schedule.peak else 0.0
        peaks = self.peaks or [dict.fromkeys(block.units, 0.0) for block in self.omission.blocks]
        return [{kind: share * peak for kind, peak in of.items()} for of in peaks]

    @property
    def figures(self) -> dict[str, float]:
        """How sparse training is, for a log: the omission rate of the optimiser step that was made last, the
        share of the FLOPs saved so far, and the speed-up that this would make if time were FLOPs."""
        saved = 1 - self.flops_done / self.flops_dense if self.flops_dense else 0.0
        return {
            "omission_rate": self.schedule.rate(max(0, self.step_number - 1)),
            "flops_saved": saved,
            "speedup_by_flops": 1 / (1 - saved),
        }

    @property
    def shares_kept(self) -> dict[str, float]:
        """The share of each block's heads and channels that runs: `heads_kept/0`, `channels_kept/0`..."""
        return {
            f"{NAMES[kind]}_kept/{number}": 1.0 if mask is None else float(mask.double().mean())
            for number, (block, kept) in enumerate(zip(self.omission.blocks, self.kept, strict=True))
            for kind, mask in kept.items()
            if kind in block.units
        }

    def _keep(self, rates: Rates) -> list[dict[Kind, int]]:
        """Units that each group of each block keeps at these rates."""
        return [
            {kind: units_kept(kind, units, of[kind]) for kind, units in block.units.items()}
            for block, of in zip(self.omission.blocks, rates, strict=True)
        ]

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._probing:
            return
        if not module.training:
            self.omission.disengage()
            return
        if not self._ready:
            self._begin_step(args, kwargs)
            self._ready = True
        self.omission.engage()
        for length in _lengths(args, kwargs):
            self.flops_done += sum(self._work.passes(length))
            self.flops_dense += sum(self._dense.passes(length))

    @torch.compiler.disable
    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not module.training or self._probing:
            return
        if read := context_length(self.model):
            self.flops_done -= len(batch_of(args, kwargs)) * self._work.passes(read)[1]
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def _check_losses(self) -> None:
        """Just before the optimiser steps, so that a loss that is not finite reaches no weight."""
        losses, self._losses = self._losses, []
        if not losses:  # computed outside of the model: what it left in the smallest gradient tells
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            losses = [local(gradient).sum() for gradient in sorted(gradients, key=Tensor.numel)[:1]]
        if losses and not torch.stack(losses).isfinite().all():
            self.detach()
            raise FloatingPointError(
                f"the loss is not finite at step {self.step_number}: training stopped before it reached the "
                "weights; go on from the last checkpoint with a lower learning rate"
            )

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose what the coming optimiser step runs, if a new choice is due."""
        if self.peaks is None and self.rate:
            costs = self._measure("fisher", args, kwargs)
            self.peaks = measured_rates(self.omission, costs, self.schedule.peak, self.exempt)
        keep = self._keep(self.rates)
        rung = keep != self._keeping
        some = any(
            kept[kind] < units.size
            for kept, block in zip(keep, self.omission.blocks, strict=True)
            for kind, units in block.units.items()
        )
        due = some and self.step_number - self._chosen_at >= self.probe_every
        if not (rung or due):
            return
        self.whole()
        self._settle()
        if some:
            self._probe(args, kwargs)
            self._choose(keep, rung)
        else:
            self.kept = [dict.fromkeys(KINDS) for _ in self.omission.blocks]
        self._keeping, self._chosen_at = keep, self.step_number
        self._use()

    def _measure(self, metric: Importance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scores:
        """By the whole model, on a few sequences of a batch."""
        self._probing = True
        try:
            with calls_as_ever(self.model):  # it looks at what each place of the batch gives
                measured = measure(self.model, self.omission, metric, args, kwargs)
        finally:
            self._probing = False
        if metric not in ("uniform", "magnitude"):
            sequences, length = probed(args, kwargs, metric)
            forward, backward = self._dense.passes(length)
            self.flops_done += sequences * (forward + backward * (metric in WITH_LOSS))
        return measured

    def _probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        measured = self._measure(self.importance, args, kwargs)
        if self.scores is None:
            self.scores = measured
            return
        for old, new in zip(self.scores, measured, strict=True):
            for kind, score in old.items():
                score.lerp_(new[kind], 1 - SMOOTHING)

    def _choose(self, keep: list[dict[Kind, int]], rung: bool) -> None:
        assert self.scores is not None
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step_number)
        how: Select = "sample" if self.importance == "uniform" else self.how
        for kind in KINDS:
            sizes = self._sizes(kind, keep, rung)
            for number, kept in enumerate(self.kept):
                size = sizes.get(number)
                kept[kind] = None if size is None else select(self.scores[number][kind], size, how, generator)

    def _sizes(self, kind: Kind, keep: list[dict[Kind, int]], rung: bool) -> dict[int, int]:
        """How many units each group keeps, of the blocks that omit any."""
        assert self.scores is not None
        alike: dict[tuple[Units, int], list[int]] = {}
        for number, block in enumerate(self.omission.blocks):
            if kind in block.units and keep[number][kind] < block.units[kind].size:
                alike.setdefault((block.units[kind], keep[number][kind]), []).append(number)
        sizes: dict[int, int] = {}
        for (units, size), members in alike.items():
            if not rung:
                shared = [int(cast(Tensor, self.kept[n][kind]).sum()) // units.groups for n in members]
            elif self.across_layers:
                scores = [self.scores[number][kind] for number in members]
                shared = share_out(scores, size, multiple_of(kind, units))
            else:
                shared = [size] * len(members)
            sizes |= zip(members, shared, strict=True)
        return sizes

    def _use(self) -> None:
        self._work = Work(self.omission, self.model, self.kept)
        self.omission.choose(self.kept)
        self._frozen.choose(self.counts)

    def _settle(self) -> None:
        """Bring the counts up to date; they change only with the set otherwise."""
        steps, self._settled = self._frozen.steps - self._settled, self._frozen.steps
        for counts, kept in zip(self.counts, self.kept, strict=True):
            for kind, count in counts.items():
                mask = kept[kind]
                count += steps if mask is None else steps * mask

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs: importance, the set and the counts, by block and kind."""
        self._settle()
        numbers = [self.step_number, self._chosen_at, self._frozen.steps]
        state = {
            "steps": torch.tensor(numbers),
            "flops": torch.tensor([self.flops_done, self.flops_dense], dtype=torch.float64),
        }
        if self.auto and self.peaks is not None:
            peaks = [[of.get(kind, 0.0) for kind in KINDS] for of in self.peaks]
            state["peaks"] = torch.tensor(peaks, dtype=torch.float64)  # (blocks, kinds)
        if self._keeping is not None:
            keeping = [[kept.get(kind, 0) for kind in KINDS] for kept in self._keeping]
            state["keeping"] = torch.tensor(keeping)  # (blocks, kinds)
        for number, block in enumerate(self.omission.blocks):
            for kind in block.units:
                name, mask = f"{number}.{kind}", self.kept[number][kind]
                state[f"{name}.counts"] = self.counts[number][kind].clone()
                if mask is not None:
                    state[f"{name}.kept"] = mask
                if self.scores is not None:
                    state[f"{name}.scores"] = self.scores[number][kind].clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was called; after `attach`, with the same model and settings.

        Raises:
            ValueError: the state is of a model of another shape.
        """
        own = {
            f"{number}.{kind}.counts": (units.groups, units.size)
            for number, block in enumerate(self.omission.blocks)
            for kind, units in block.units.items()
        }
        given = {name: tuple(value.shape) for name, value in state.items() if name.endswith(".counts")}
        if own != given:
            raise ValueError("the state to resume from is of a model with other blocks, heads or channels")
        self.whole()
        self.step_number, self._chosen_at, self._frozen.steps = state["steps"].tolist()
        self.flops_done, self.flops_dense = state["flops"].tolist()
        if self.auto and "peaks" in state:
            self.peaks = [
                {kind: float(row[KINDS.index(kind)]) for kind in block.units}
                for block, row in zip(self.omission.blocks, state["peaks"], strict=True)
            ]
        if "keeping" in state:
            self._keeping = [
                {kind: int(row[KINDS.index(kind)]) for kind in block.units}
                for block, row in zip(self.omission.blocks, state["keeping"], strict=True)
            ]
        self._ready, self._settled = False, self._frozen.steps
        self.counts = self._read(state, "counts")
        self.kept = [{kind: state.get(f"{b}.{kind}.kept") for kind in KINDS} for b in range(len(self.kept))]
        if any(name.endswith(".scores") for name in state):
            self.scores = self._read(state, "scores")
        self._use()

    def _read(self, state: dict[str, Tensor], what: str) -> list[dict[Kind, Tensor]]:
        return [
            {kind: state[f"{number}.{kind}.{what}"].clone() for kind in block.units}
            for number, block in enumerate(self.omission.blocks)
        ]


def _lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Of the sequences of a call, in tokens: without padding, where asking for it waits for no device."""
    batch, mask = batch_of(args, kwargs), kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.is_cpu and mask.shape == batch.shape[:2]:
        return mask.count_nonzero(dim=1).tolist()
    return [batch.shape[1]] * len(batch)
