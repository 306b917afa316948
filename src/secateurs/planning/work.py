"""What a run of `prune` computes, counted: operations, bytes and calls by phase, from a model's anatomy.

This is the walk of `pruning/walk.py`, `block/local.py` and `block/joint.py` once more, without a tensor in
it. Amounts are those of the busiest of the ranks. `tests/planning` holds them against what a run does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from secateurs.anatomy import MLP, BlockAnatomy, Matrix
from secateurs.pattern import NM, Pattern
from secateurs.pruning.block.joint import Joint
from secateurs.pruning.block.local import Local, stages_of
from secateurs.pruning.block.measure import Group
from secateurs.pruning.block.refine import JUDGES, TOKENS_A_STEP, shown_tokens
from secateurs.pruning.block.rounding import Rounded, ToGrids
from secateurs.pruning.mlp.linear import solving_cost
from secateurs.pruning.mlp.problem import CHUNK, HELD_OUT
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.solvers.admm import ADMM, RHO
from secateurs.pruning.solvers.rounding import Rounding
from secateurs.pruning.solvers.solver import Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import PANEL
from secateurs.pruning.solvers.sweep import whole_groups
from secateurs.ranks import owners_of, parts_of
from secateurs.values import Values

Phase = Literal["text", "load", "survey", "run", "solve", "refine", "write", "recover"]
"""text: what the model writes itself; survey: what is measured on the dense model, such as experts."""

Kind = Literal[
    "products",
    "attention",
    "sums",
    "float32",
    "factors",
    "sweep",
    "ranked",
    "rounded",
    "passed",
    "moved",
    "calls",
    "shapes",
    "recalled",
    "drawn",
    "python",
    "disk",
]
"""products: floating-point operations (FLOPs) of products in the dtype that the model runs in; attention: of
those of attention, whose softmax comes with them; sums: of those that are summed over tokens in float32, such
as second moments; float32: of products in it; factors: of factorisations, inverses and triangular solves;
sweep: of SparseGPT's inner loop; ranked: weights among which a threshold is found; rounded: weights that are,
a group of columns at a time; passed: values in the model's dtype that elementwise work of its own code goes
through; moved: bytes that other elementwise work reads and writes; calls: kernels that are started; shapes:
products of as many tokens as none before, for which a processor's library makes a kernel in half precision;
recalled: values in keys and values that a single new token attends to; drawn: logits from which tokens are
drawn; python: seconds of Python around kernels, taken to be the same everywhere; disk: bytes read and written
there."""

FLOPS: tuple[Kind, ...] = ("products", "attention", "sums", "float32", "factors", "sweep")


class Amounts(dict[tuple[Phase, Kind], float]):
    """How much of each kind of work, by phase; what is not there is 0."""

    def __missing__(self, key: tuple[Phase, Kind]) -> float:
        return 0.0

    def add(self, more: "Amounts", times: float = 1) -> None:
        """Also that, so many times."""
        for key, amount in more.items():
            self[key] += times * amount

    def in_phase(self, phase: Phase) -> "Amounts":
        """All of it, whichever phase it was counted in."""
        found = Amounts()
        for (_, kind), amount in self.items():
            found[phase, kind] += amount
        return found


PASSES = {
    "forward": 3,
    "admm": 24,
    "polish": 36,
    "local": 12,
    "rounding": 40,
    "step": 60,
    "descent": 27,
    "adam": 60,
}
"""How often elementwise work goes through what it works on: each value that a matrix is given or gives in a
forward pass; read or written, a weight in an iteration of ADMM, in one of conjugate gradients, in a solver
else, and beside its columns' own work in one that rounds; a channel in a step of SparseLLM; and bytes for
each weight in a step of the descent, and more for each that is left."""

CALLS = {"forward": 60, "group of an expert": 20, "matrix": 30, "iteration": 25, "step": 400}
"""Kernels of a batch's way through a block, and through each group of matrices of an expert; of a matrix that
is solved, and of an iteration on it; and of a step of the descent."""


@dataclass(frozen=True)
class Text:
    """Calibration sequences as one rank has them."""

    samples: int
    length: int
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def batches(self) -> int:
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class BlockWork:
    """What is done to one block.

    Args:
        anatomy: of the block.
        pruner: how it is pruned, and perhaps rounded.
        pattern: of all of its matrices.
        text: the calibration text.
        dtype_bytes: of the dtype that the model runs in.
        low: whether SparseLLM multiplies tokens in that dtype, and not in float32.
        halves: whether of second moments only the half from the diagonal on is computed.
        ranks: that share the work.
    """

    anatomy: BlockAnatomy
    pruner: Joint | Local | Rounded
    pattern: Pattern
    text: Text
    dtype_bytes: int
    low: bool
    halves: bool
    ranks: int = 1

    @property
    def amounts(self) -> Amounts:
        """All of it but for pushing its result on (`pushed`)."""
        return sum_of(
            self._joint(pruner) if isinstance(pruner, Joint) else self._local(pruner)
            for pruner in self.pruners
        )

    @property
    def pruners(self) -> list[Joint | Local]:
        """That go through it, one after the other."""
        if isinstance(self.pruner, Rounded):
            return [self.pruner.pruner, self.pruner.rounder]
        return [self.pruner]

    def pushed(self) -> Amounts:
        """What makes the next block's input."""
        return self.forward("run", self.text.tokens) if self.text.samples else Amounts()

    @property
    def values(self) -> float:
        """That the matrices are given and give, for a token."""
        return sum(self.share(matrix) * sum(matrix.shape) for matrix in self.anatomy.matrices.values())

    @cached_property
    def weights(self) -> int:
        """That are pruned."""
        return sum(rows * columns for rows, columns in (m.shape for m in self.anatomy.matrices.values()))

    # A block's forward pass.

    def share(self, matrix: Matrix) -> float:
        """Of the tokens, those that a matrix sees."""
        return 1.0 if matrix.expert is None else self.anatomy.routed.get(matrix.weight, 1.0)

    def forward(
        self, phase: Phase, tokens: float, until: Group | None = None, *, times: float = 1
    ) -> Amounts:
        """Tokens' way through a block as far as a group's input, or to its end."""
        flops = values = attention = 0.0
        calls, shapes = CALLS["forward"], 0
        for group in self.anatomy.groups:
            if self.anatomy.reads_mixed(group) and self.anatomy.heads is not None:
                heads = self.anatomy.heads
                # Two products, half of each masked.
                attention += 2.0 * heads.count * heads.dim * self.text.length
            if group is until:
                break
            for matrix in group:
                flops += 2.0 * self.share(matrix) * matrix.shape[0] * matrix.shape[1]
                values += self.share(matrix) * sum(matrix.shape)
            if group[0].expert is not None:
                calls += CALLS["group of an expert"]
                shapes += 1
        batches = max(tokens / (self.text.length * self.text.batch_size), 1)
        return Amounts(
            {
                (phase, "products"): times * tokens * flops,
                (phase, "attention"): times * tokens * attention,
                (phase, "passed"): times * tokens * values * PASSES["forward"],
                (phase, "calls"): times * batches * calls,
                (phase, "shapes"): times * batches * shapes,
            }
        )

    # Sums over tokens.

    def _sums(self, phase: Phase, flops: float, values: float) -> Amounts:
        return Amounts({(phase, "sums"): flops, (phase, "moved"): values * self.dtype_bytes})

    def moment(self, phase: Phase, tokens: float, width: int) -> Amounts:
        """The second moment of inputs."""
        columns = width + min(PANEL, width) if self.halves else 2 * width
        return self._sums(phase, tokens * width * columns, 2 * tokens * width)

    def _products(self, phase: Phase, tokens: float, rows: int, columns: int) -> Amounts:
        """Of targets with inputs."""
        return self._sums(phase, 2.0 * tokens * rows * columns, 2 * tokens * (rows + columns))

    # Solvers.

    def _solved(self, solver: Solver, group: Sequence[Matrix], *, fitted: bool = False) -> Amounts:
        """Matrices that see the same input, shared out over ranks as `ranks.shared_out` does."""
        costs = [solving_cost(*matrix.shape) for matrix in group]
        counts = parts_of(list(zip(costs, (matrix.shape[0] for matrix in group), strict=True)), self.ranks)
        parts = [
            (cost / count, (matrix.shape[0] // count, matrix.shape[1]))
            for matrix, cost, count in zip(group, costs, counts, strict=True)
            for _ in range(count)
        ]
        loads: list[list[tuple[float, tuple[int, int]]]] = [[] for _ in range(self.ranks)]
        for part, owner in zip(parts, owners_of([cost for cost, _ in parts], self.ranks), strict=True):
            loads[owner or 0].append(part)
        amounts = self.factored(solver, group[0].shape[1], fitted=fitted)
        for _, shape in max(loads, key=lambda load: sum(cost for cost, _ in load)):
            amounts.add(self._solved_one(solver, *shape, fitted=fitted))
        return amounts

    def factored(self, solver: Solver, columns: int, *, fitted: bool = False) -> Amounts:
        """What matrices share that see the same input."""
        cubes = 0.0
        if isinstance(solver, ADMM):
            cubes = float(len(RHO))  # a third for the factor, two for the inverse
        if isinstance(solver, SparseGPT | Rounding | ToGrids) or fitted:
            cubes += 1 / 3
        return Amounts(
            {
                ("solve", "factors"): cubes * columns**3,
                ("solve", "moved"): 8.0 * columns**2 * 4,
            }
        )

    def _solved_one(self, solver: Solver, rows: int, columns: int, *, fitted: bool) -> Amounts:
        size, square = float(rows * columns), float(rows * columns**2)
        amounts = self.solution(solver, rows, columns)
        amounts["solve", "float32"] += 4 * square  # the error
        amounts["solve", "moved"] += PASSES["local"] * 4 * size
        if fitted:
            amounts["solve", "float32"] += 2 * square
            amounts["solve", "factors"] += 2 * square
        return amounts

    def solution(self, solver: Solver, rows: int, columns: int) -> Amounts:
        """What a solver does to a matrix (out, in), once its statistics are there and factored."""
        size, square = float(rows * columns), float(rows * columns**2)
        amounts: Amounts = Amounts({("solve", "calls"): CALLS["matrix"]})
        ranked = 0.0 if isinstance(self.pattern, NM) else 1.0
        if isinstance(solver, SparseGPT):
            block = whole_groups(solver.block, self.pattern)
            amounts["solve", "float32"] += square + 2 * size * block
            amounts["solve", "factors"] += _inverted(columns, block)
            amounts["solve", "sweep"] += size * block
            amounts["solve", "ranked"] += ranked * size
            amounts["solve", "calls"] += CALLS["iteration"] * columns / block
        elif isinstance(solver, ToGrids):
            amounts.add(rounding(rows, columns))
        elif isinstance(solver, Rounding):
            amounts.add(rounding(rows, columns, solver.values.group))
        elif isinstance(solver, ADMM):
            iterations = solver.iterations + solver.polish
            amounts["solve", "float32"] += 2 * square * (3 + iterations)
            amounts["solve", "moved"] += (
                4 * size * (PASSES["admm"] * solver.iterations + PASSES["polish"] * solver.polish)
            )
            amounts["solve", "ranked"] += size * solver.iterations
            amounts["solve", "calls"] += CALLS["iteration"] * iterations
        else:
            amounts["solve", "ranked"] += ranked * size
        return amounts

    # Ways to prune.

    @property
    def expert_groups(self) -> list[Group]:
        return [group for group in self.anatomy.groups if group[0].expert is not None]

    @property
    def choices(self) -> int:
        """Experts that a token goes to."""
        return round(sum(self.share(group[0]) for group in self.expert_groups if not self._is_down(group)))

    def _local(self, pruner: Local) -> Amounts:
        amounts = Amounts()
        for stage in stages_of(self.anatomy, pruner.sequential):
            if self.text.samples:
                amounts.add(self.forward("run", self.text.tokens, stage[-1]))
                for group in stage:
                    amounts.add(self.moment("run", self.text.tokens, group[0].shape[1]))
            for group in stage:
                amounts.add(self._solved(pruner.solver, group))
        experts = self.expert_groups
        if experts and self.text.samples:
            amounts.add(self.forward("run", self.text.tokens))
        for group in experts:
            amounts.add(self._expert(pruner.solver, group))
        return amounts

    def expert_tokens(self, group: Group) -> float:
        """Those routed to an expert, and those drawn from all."""
        drawn = self.expert_groups[0][0].shape[1]
        return self.share(group[0]) * self.text.tokens + drawn / self.ranks

    def _expert(self, solver: Solver, group: Group) -> Amounts:
        """Matrices of an expert that share an input."""
        tokens = self.expert_tokens(group)
        amounts = self.moment("run", tokens, group[0].shape[1])
        amounts["run", "passed"] += PASSES["forward"] * tokens * sum(sum(matrix.shape) for matrix in group)
        if not self._is_down(group):
            amounts["run", "products"] += 2 * tokens * _size(group)
        # As many experts at a time as there are ranks.
        for key, amount in replace(self, ranks=1)._solved(solver, group).items():
            amounts[key] += amount / self.ranks
        return amounts

    def _is_down(self, group: Group) -> bool:
        return any("down" in self.anatomy.roles.get(matrix.name, ()) for matrix in group)

    def _joint(self, pruner: Joint) -> Amounts:
        text, method = self.text, pruner.method
        amounts = Amounts()
        if pruner.target != "layer":
            streams = 1 if pruner.target == "block" or pruner.repair == 1 else 2
            amounts.add(self.forward("run", text.tokens, times=streams))
        for group in self.apart:
            fitted = self.is_fitted(pruner, group)
            amounts.add(self.forward("run", text.tokens, self._group_of(group[0])))
            amounts.add(self.moment("run", text.tokens, group[0].shape[1]))
            if fitted:
                amounts.add(self._products("run", text.tokens, *group[0].shape))
            amounts.add(self._solved(method.solver, group, fitted=fitted))
        for mlp in self.mlps:
            if mlp.down.expert is None:
                amounts.add(self.forward("run", text.tokens, self._group_of(mlp.first[0])))
                amounts.add(self._sparsellm(method, mlp, text.tokens))
        experts = self.expert_groups
        if experts:
            amounts.add(self.forward("run", text.tokens))
        for mlp in self.mlps:
            if mlp.down.expert is not None:
                tokens = self.expert_tokens(self._group_of(mlp.first[0]))
                amounts["run", "products"] += 2 * tokens * _size((*mlp.first, mlp.down))
                amounts.add(self._sparsellm(method, mlp, tokens))
        if pruner.refine and pruner.target != "layer":
            amounts.add(self._descent(pruner.refine))
        return amounts

    @property
    def apart(self) -> list[Group]:
        """What is pruned matrix by matrix: all but MLPs that are understood, and experts."""
        solved = {m.name for mlp in self.mlps for m in (*mlp.first, mlp.down)}
        groups = (
            tuple(m for m in g if m.name not in solved and m.expert is None) for g in self.anatomy.groups
        )
        return [group for group in groups if group]

    def is_fitted(self, pruner: Joint, group: Group) -> bool:
        """Whether matrices are fitted to what lies beyond them before they are pruned."""
        return pruner.target != "layer" and self.anatomy.reads_mixed(group)

    @property
    def mlps(self) -> list[MLP]:
        return [mlp for mlp in self.anatomy.mlps if mlp.activation is not None]

    def _group_of(self, matrix: Matrix) -> Group:
        return next(group for group in self.anatomy.groups if matrix in group)

    def _sparsellm(self, method: SparseLLM, mlp: MLP, tokens: float) -> Amounts:
        """An MLP as one problem: see `mlp/sparsellm.py`."""
        rounds = method.rounds
        first, (hidden, channels) = sum(m.shape[0] for m in mlp.first), mlp.down.shape
        width = mlp.first[0].shape[1]
        solving = tokens * (1 - 1 / HELD_OUT) if rounds else tokens
        through = 2.0 * solving * first * width
        amounts = self.moment("solve", solving, width)
        product: Kind = "products" if self.low else "float32"
        amounts["solve", product] += through
        for number in range(rounds + 1):
            amounts.add(self._solved(method.solver, mlp.first, fitted=number > 0))
            amounts["solve", product] += through
            amounts["solve", "passed"] += PASSES["forward"] * solving * (first + channels)
            amounts.add(self.moment("solve", solving, channels))
            amounts.add(self._products("solve", solving, hidden, channels))
            amounts.add(self._solved(method.solver, [mlp.down], fitted=True))
            if number < rounds:
                amounts["solve", product] += 4 * solving * hidden * channels
                amounts.add(self._products("solve", solving, first, width))
                amounts["solve", "float32"] += 2 * solving * hidden**2 + 4.0 * hidden**2 * channels
                amounts["solve", "factors"] += hidden**3
                amounts["solve", "moved"] += 4 * PASSES["step"] * solving * first
            if rounds:
                held = tokens / HELD_OUT
                amounts["solve", product] += 2 * held * (first * width + hidden * channels)
            amounts["solve", "calls"] += solving / CHUNK * CALLS["forward"] * (4 if rounds else 1)
        return amounts

    def _descent(self, passes: int) -> Amounts:
        """See `block/refine.py`: in float32, but multiplied in the dtype of the model where that is fast."""
        text = self.text
        by_one = min(text.length, TOKENS_A_STEP)
        steps = passes * -(-text.samples * self.ranks // max(1, TOKENS_A_STEP // by_one))
        judged = 2 * max(1, text.samples // JUDGES) * text.length
        own = passes * text.samples * by_one
        shown = min(text.length, shown_tokens(self.ranks))
        if TOKENS_A_STEP // shown < self.ranks:
            own = steps * shown  # where a step has fewer sequences than there are ranks, they take turns
        amounts = self.forward("refine", judged)
        # Back again is twice the way there, of float32 where the way there was of the model's.
        amounts.add(self.forward("refine", own, times=3))
        amounts["refine", "shapes"] = 3.0 * steps * len(self.expert_groups)
        amounts["refine", "passed"] *= 4 / self.dtype_bytes
        each = PASSES["descent"] + (1 - self.pattern.sparsity) * PASSES["adam"]
        amounts["refine", "moved"] += steps * each * self.weights
        amounts["refine", "calls"] += steps * CALLS["step"]
        return amounts


def rounding(rows: int, columns: int, group: int = Values.group) -> Amounts:
    """What a matrix (out, in) is rounded by: see `solvers/rounding.py`."""
    size = float(rows * columns)
    amounts = Amounts({("solve", "rounded"): size})
    amounts["solve", "float32"] = (1 + 2 * Rounding.passes) * size * columns
    amounts["solve", "float32"] += 2 * Rounding.passes * size * group
    amounts["solve", "factors"] = _inverted(columns, group)
    amounts["solve", "moved"] = 4 * PASSES["rounding"] * size
    amounts["solve", "calls"] = (1 + Rounding.passes) * CALLS["iteration"] * columns / group
    return amounts


def _inverted(columns: int, block: int) -> float:
    """Of the factor's blocks along the diagonal."""
    whole, rest = divmod(columns, block)
    return float(whole * block**3 + rest**3)


def sum_of(amounts: Iterable[Amounts]) -> Amounts:
    total = Amounts()
    for each in amounts:
        total.add(each)
    return total


def _size(matrices: Iterable[Matrix]) -> float:
    return float(sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices))
