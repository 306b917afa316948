"""A sweep over columns, block by block, and SparseGPT's over one block: the reference in torch.

`sweep_cpu` and `sweep_triton` do the latter, faster; `sparsegpt` picks one of the three.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from secateurs.pattern import NM, Pattern

INNER = 16
"""Columns swept one by one between two products."""


def blocks(weight: Tensor, factor: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Columns, some at a time, each time corrected for what has become of those before.

    With R = U^-1, that is H = R R^T, and D = W - S the change so far, earlier columns correct a block b by

        w_b = W_b + D_before R_before,b U_bb        where U_bb = R_bb^-1 is as small as the block,

    which equals SparseGPT's W_b - E_before U_before,b because E = D R are its errors.

    Args:
        weight: W, (in, out), so that a column of the layer is contiguous. What is yielded is to be changed
            there, with what that does to columns of the block itself.
        factor: R, (in, in).
        size: columns at a time.

    Yields:
        Which columns, and U_bb.
    """
    change = weight.clone()
    for start in range(0, len(weight), size):
        before, now = slice(start), slice(start, start + size)
        corner = factor[now, now]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)).to(corner), upper=True)
        weight[now].addmm_(inverse.T, factor[before, now].T @ change[before])
        yield now, inverse
        change[now] -= weight[now]


def sweep(weight: Tensor, inverse: Tensor, pattern: Pattern) -> None:
    """Prune one block of columns in place: the reference for the Triton and the C++ kernel.

    In two levels: 16 columns one by one, then one product that pushes their errors to the rest of the block.

    Args:
        weight: (block, out), corrected for the errors of all earlier blocks.
        inverse: (block, block), the diagonal block of U.
        pattern: unstructured, its mask is chosen once, over the whole block; n:m, at every m-th column.
    """
    group = pattern.m if isinstance(pattern, NM) else len(weight)
    inner = whole_groups(INNER, pattern)
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


def whole_groups(columns: int, pattern: Pattern) -> int:
    """`columns`, rounded down to whole groups of the pattern, at least one."""
    return max(columns // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else columns
