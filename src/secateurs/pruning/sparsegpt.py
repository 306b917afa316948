"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774, sections 3.2 to 3.4, algorithm 1).

Columns are pruned from left to right, and what each one loses is made up for by the columns to its right.
The paper reads the corrections from U, the upper Cholesky factor of H^-1. Here neither is formed: with
R = U^-1, that is H = R R^T, and D = W - S the change so far, the earlier columns correct a block b by

    w_b = W_b + D_before R_before,b U_bb        where U_bb = R_bb^-1 is as small as the block,

which equals the paper's W_b - E_before U_before,b because E = D R are its errors. A Cholesky factorisation
is then all that is done at full size. Within the block the sweep is the paper's, on U_bb.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from secateurs.pattern import NM, Pattern
from secateurs.pruning.solver import Solution, finished, working_dtype
from secateurs.pruning.statistics import Statistics

INNER = 16
"""Columns swept one by one between two products."""


@dataclass(frozen=True)
class SparseGPT:
    """One-shot pruning with second-order corrections.

    Args:
        block: columns among which an unstructured mask is chosen at a time, over all outputs; rounded down to
            a multiple of m for n:m.
        damping: added to the diagonal of H, as a share of its mean. Grows if the factorisation fails.

    Raises:
        ValueError: a setting that is not positive.
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is a number of columns, not {self.block}")
        if not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping}")

    @torch.no_grad()
    def solve(self, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        """See `Solver.solve`. The weights of dead inputs (H_jj = 0) become 0."""
        pattern.check_width("the weight", weight.shape[1])
        dtype = working_dtype(weight)
        factor = statistics.factor(self.damping).to(dtype)
        # (in, out), so that a column of the layer is contiguous.
        pruned = weight.T.to(dtype, copy=True, memory_format=torch.contiguous_format)
        pruned[statistics.norms == 0] = 0
        change = pruned.clone()
        sweep = _sweep_for(pruned)
        block = _multiple(self.block, pattern)
        for start in range(0, len(pruned), block):
            before, now = slice(start), slice(start, start + block)
            corner = factor[now, now]
            inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)).to(corner), upper=True)
            pruned[now].addmm_(inverse.T, factor[before, now].T @ change[before])
            sweep(pruned[now], inverse, pattern)
            change[now] -= pruned[now]
        return Solution(finished(pruned.T.contiguous()))


def sweep(weight: Tensor, inverse: Tensor, pattern: Pattern) -> None:
    """Prune one block of columns in place: the reference for the Triton and the C++ kernel.

    In two levels: 16 columns one by one, then one product that pushes their errors to the rest of the block.

    Args:
        weight: (block, out), corrected for the errors of all earlier blocks.
        inverse: (block, block), the diagonal block of U.
        pattern: unstructured, its mask is chosen once, over the whole block; n:m, at every m-th column.
    """
    group = pattern.m if isinstance(pattern, NM) else len(weight)
    inner = _multiple(INNER, pattern)
    scale = inverse.diagonal()
    keep = torch.empty_like(weight)
    error = torch.empty_like(weight)
    for start in range(0, len(weight), inner):
        stop = min(start + inner, len(weight))
        for j in range(start, stop):
            if j % group == 0:
                rivals = slice(j, j + group)
                keep[rivals] = choose(weight[rivals], scale[rivals], pattern)
                torch.div(1 - keep[rivals], scale[rivals, None], out=error[rivals])
            error[j].mul_(weight[j])
            weight[j + 1 : stop].addr_(inverse[j, j + 1 : stop], error[j], alpha=-1)
        weight[stop:].addmm_(inverse[start:stop, stop:].T, error[start:stop], alpha=-1)
    weight.mul_(keep)


def choose(weight: Tensor, scale: Tensor, pattern: Pattern) -> Tensor:
    """True where a weight of the group stays, by the paper's w^2 / U_jj^2; (columns, out)."""
    return pattern.keep((weight.abs() / scale[:, None]).T).T


def _sweep_for(weight: Tensor) -> Callable[[Tensor, Tensor, Pattern], None]:
    """The kernel for it where there is one, otherwise `sweep`."""
    if weight.is_cuda and find_spec("triton"):
        from secateurs.pruning import sweep_triton

        return sweep_triton.sweep
    from secateurs.pruning import sweep_cpu

    return sweep_cpu.sweep if sweep_cpu.serves(weight) else sweep


def _multiple(columns: int, pattern: Pattern) -> int:
    """`columns`, rounded down to whole groups of the pattern, at least one."""
    return max(columns // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else columns
