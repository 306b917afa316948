"""SparseLLM's steps of p, z and s: each lowers the objective while all else is held.

See `secateurs.pruning.mlp.sparsellm` for what the letters are.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def hidden_inverse(gram: Tensor, ratio: float) -> Tensor:
    """(Wd Wd^T + ratio I)^-1, (hidden, hidden).

    Where it is singular in the dtype that is computed in, all of it is NaN, and so is the objective of the
    step that uses it: the iterations end, and what was pruned until then stands.

    Args:
        gram: Wd Wd^T, (hidden, hidden); modified.
        ratio: gamma.
    """
    gram.diagonal().add_(ratio)
    factor, failed = torch.linalg.cholesky_ex(gram)
    return torch.full_like(gram, torch.nan) if failed else torch.cholesky_inverse(factor)


def correct_p(gap: Tensor, pull: Tensor, inverse: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """What to add to q = f(s) z for the p that lowers gamma |p - q|^2 + |Y - Wd p|^2 most, and the Y - Wd p
    that it leaves.

    By the matrix inversion lemma that p is q + Wd^T (Wd Wd^T + gamma I)^-1 (Y - Wd q): a system of the hidden
    size, where the paper's (Wd^T Wd + gamma I)^-1 (Wd^T Y + gamma q) has one of the channels'. What it leaves
    is gamma (Wd Wd^T + gamma I)^-1 (Y - Wd q).

    Args:
        gap: Y - Wd q, (tokens, hidden).
        pull: (Wd Wd^T + gamma I)^-1 Wd, (hidden, channels), in a dtype to multiply in: as its parts are far
            larger than itself, it is computed beforehand, in full precision.
        inverse: `hidden_inverse` of Wd Wd^T, (hidden, hidden).
        ratio: gamma, as it was given there.

    Returns:
        (tokens, channels) and (tokens, hidden).
    """
    return gap.to(pull.dtype) @ pull, (gap @ inverse).mul_(ratio)


def step_z(active: Tensor, model: Tensor, p: Tensor, alpha: float, gamma: float) -> Tensor:
    """The z that lowers alpha (z - m)^2 + gamma (p - f(s) z)^2 most, elementwise.

    Args:
        active: f(s).
        model: m = Wu x + bu.
        p: the input of down.
    """
    return (alpha * model + gamma * active * p) / (alpha + gamma * active.square())


def step_s(
    activation: Activation, start: Tensor, model: Tensor, p: Tensor, z: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """An s that lowers alpha (s - m)^2 + gamma (p - f(s) z)^2, elementwise, and f(s).

    The lowest there is for ReLU, as the better of two branches; for smooth activations a Gauss-Newton step
    where it helps; where it does not, s stays.

    Args:
        activation: f.
        start: s before; nowhere is the result worse.
        model: m.
        p: the input of down.
        z: that multiplies f(s); 1 for an MLP without a gate.
    """

    def value(away: Tensor, missed: Tensor) -> Tensor:
        return away.square().mul_(alpha).addcmul_(missed, missed, value=gamma)

    if isinstance(activation, nn.ReLU):
        off = model.clamp_max(0)
        on = ((alpha * model + gamma * z * p) / (alpha + gamma * z * z)).clamp_min_(0)
        s = torch.where(value(off - model, p) < value(on - model, p - on * z), off, on)
        return s, s.clamp_min(0)
    active, slope = _value_and_slope(activation, start)
    away, missed, tilt = start - model, torch.addcmul(p, active, z, value=-1), slope.mul_(z)
    now = value(away, missed)
    step = away.mul_(alpha).addcmul_(missed, tilt, value=-gamma).div_(tilt.square_().mul_(gamma).add_(alpha))
    there = start - step
    active_there = activation(there)
    better = value(there - model, torch.addcmul(p, active_there, z, value=-1)) < now
    return torch.where(better, there, start), torch.where(better, active_there, active)


def _value_and_slope(activation: Activation, s: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        active = activation(s)
        (slope,) = torch.autograd.grad(active.sum(), s)
    return active.detach(), slope
