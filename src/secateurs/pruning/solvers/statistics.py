"""The second moment of a layer's input, which is all that the local solvers know of the calibration text.

It is accumulated as activations stream by, and factored at most once per setting: layers that see the same
input (q, k and v; gate and up) share one object, and with it the factors.

Where the device can sum their products in float32, inputs in half precision are multiplied as they are, and
what they are multiplied with is rounded to match: bfloat16 on GPUs from Ampere on and on CPUs with AVX-512
BF16, float16 on any GPU if both are. Elsewhere both are converted to the dtype of the sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.device import multiplies_bfloat16
from secateurs.pruning.solvers import products_cpu

CHUNK = 4096
"""Tokens taken in at a time."""

PANEL = 256
"""Rows of H computed at a time, from the diagonal to the right."""

MOST_DAMPING = 1.0
"""Share of the mean of H's diagonal at which a factorisation that keeps failing is given up."""


class Statistics:
    """H = X X^T / T over the T tokens seen so far, for inputs X (in, T).

    Memory: one (in, in) matrix, and one more for each factor asked for (`factor`, `ridge_inverse`), which
    stays until the next `update`; computing a factor holds two for a moment. At 11008 inputs and float32 a
    matrix is 485 MB.

    Args:
        width: number of inputs of the layer.
        dtype: in which H is accumulated and factored.
        device: where.
    """

    def __init__(
        self, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.tokens = 0
        self.mean = torch.zeros(width, dtype=dtype, device=device)
        """Of the inputs, (in,)."""
        self._moment = torch.zeros(width, width, dtype=dtype, device=device)
        self._mirrored = True
        self._centred: Statistics | None = None
        self._shrunk: dict[float, Statistics] = {}
        self._factors: dict[float, Tensor] = {}
        self._inverses: dict[float, Tensor] = {}

    @classmethod
    def from_inputs(cls, inputs: Tensor, *, dtype: torch.dtype | None = None) -> "Statistics":
        """The statistics of inputs that are at hand.

        Args:
            inputs: (..., in).
            dtype: float64 for float64 inputs and float32 for others, if not given.
        """
        if dtype is None:
            dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        statistics = cls(inputs.shape[-1], dtype=dtype, device=inputs.device)
        statistics.update(inputs)
        return statistics

    @torch.no_grad()
    def update(self, inputs: Tensor) -> None:
        """Take more tokens into account.

        Args:
            inputs: (..., in), any floating-point dtype, on any device.
        """
        if not inputs.numel():
            return
        self._forget()
        tokens = inputs.reshape(-1, len(self._moment)).to(self._moment.device)
        dtype = _multiplied_in(self._moment, tokens, tokens)
        for chunk in tokens.split(CHUNK):
            chunk = chunk.to(dtype)
            self.tokens += len(chunk)
            old, new = 1 - len(chunk) / self.tokens, 1 / self.tokens
            self.mean.mul_(old).add_(chunk.sum(dim=0, dtype=self.mean.dtype), alpha=new)
            _add_products(self._moment, chunk, chunk, old, new, upper=True)

    def pool(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Take into account what others have seen of the same inputs.

        Args:
            summed: adds theirs to a tensor, in place.
        """
        self._forget()
        self.tokens = _pool(self.tokens, (self._moment, self.mean), summed)

    def _forget(self) -> None:
        """What was made of other sums."""
        self._factors.clear()
        self._inverses.clear()
        self._centred = None
        self._shrunk.clear()
        self._mirrored = False

    @property
    def moment(self) -> Tensor:
        """H, (in, in). The object's own storage: not to be modified."""
        if not self._mirrored:
            for start in range(0, len(self._moment), PANEL):
                panel = slice(start, start + PANEL)
                self._moment[panel, :start] = self._moment[:start, panel].T
                corner = self._moment[panel, panel]
                corner.copy_(corner.triu() + corner.triu(1).T)
            self._mirrored = True
        return self._moment

    def centred(self) -> "Statistics":
        """The statistics of X - mean: what is left to a layer's weights once its bias has done its part.

        Memory: one more (in, in) matrix, which stays until the next `update`.
        """
        if self._centred is None:
            centred = Statistics(len(self.mean), dtype=self._moment.dtype, device=self._moment.device)
            centred.tokens = self.tokens
            centred._moment = torch.addr(self.moment, self.mean, self.mean, alpha=-1)
            # What is left of an input that hardly varies is rounding: it counts as dead.
            rounding = 100 * torch.finfo(self.mean.dtype).eps * self.mean.square()
            still = centred._moment.diagonal() <= rounding
            centred._moment[still] = 0
            centred._moment[:, still] = 0
            self._centred = centred
        return self._centred

    def shrunk(self, share: float) -> "Statistics":
        """The statistics with H shrunk towards its diagonal: (1 - share) H + share diag(H).

        What inputs have in common on one text they have less of on others: an estimate of many covariances
        serves better the nearer it is to what is known best (Ledoit and Wolf, 2004; towards the diagonal,
        Schäfer and Strimmer, 2005).

        Memory: one more (in, in) matrix, which stays until the next `update`; none for a share of 0.

        Args:
            share: from 0 to 1.
        """
        if not share:
            return self
        if share not in self._shrunk:
            shrunk = Statistics(len(self.mean), dtype=self._moment.dtype, device=self._moment.device)
            shrunk.tokens, shrunk.mean = self.tokens, self.mean
            torch.mul(self.moment, 1 - share, out=shrunk._moment)
            shrunk._moment.diagonal().copy_(self._moment.diagonal())
            self._shrunk[share] = shrunk
        return self._shrunk[share]

    @property
    def norms(self) -> Tensor:
        """Root mean square of each input, sqrt(H_jj), (in,). Zero for a dead input."""
        return self._moment.diagonal().sqrt()

    def error(self, dense: Tensor, sparse: Tensor) -> float:
        """Relative reconstruction error tr(D H D^T) / tr(W H W^T) with D = W - S.

        Args:
            dense: W, (out, in).
            sparse: S, (out, in).

        Returns:
            The share of the output's energy that is lost; 0 where the dense layer has no output.
        """
        return share_lost(*self.lost(dense, sparse))

    def lost(self, dense: Tensor, sparse: Tensor) -> tuple[float, float]:
        """How much of a layer's output is lost, tr(D H D^T), and how much there is, tr(W H W^T)."""
        dense, sparse = dense.to(self._moment.dtype), sparse.to(self._moment.dtype)
        return self.energy(dense - sparse), self.energy(dense)

    def energy(self, weight: Tensor) -> float:
        """That of a layer's output, tr(W H W^T), a mean over the tokens; of W (out, in)."""
        weight = weight.to(self._moment.dtype)
        return float(((weight @ self.moment) * weight).sum())

    def factor(self, damping: float) -> Tensor:
        """The upper triangular R, (in, in), with R R^T = H + damping * mean(diag H) I.

        With J the flip of rows and columns, R = J chol(J H J) J. Dead inputs get H_jj = 1. Where the
        factorisation fails, ten times the damping is tried, and so on up to the mean itself.

        Args:
            damping: above 0.

        Raises:
            FloatingPointError: H holds NaN or Inf, or no damping up to the bound makes it positive definite.
        """
        if damping not in self._factors:
            self._factors[damping] = self._factorise(damping)
        return self._factors[damping]

    def _factorise(self, damping: float) -> Tensor:
        diagonal = self._finite_diagonal()
        while True:
            damped = self.moment.flip(0, 1)
            damped.diagonal().copy_((diagonal + (diagonal == 0) + damping * diagonal.mean()).flip(0))
            factor, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if not failed:
                return factor.flip(0, 1)
            if damping * 10 > MOST_DAMPING:
                raise FloatingPointError(
                    f"the second moment of the inputs is not positive definite, even with {damping:g} of its "
                    "mean diagonal added: too few or degenerate calibration tokens"
                )
            damping *= 10

    def fit(self, weight: Tensor, products: Tensor, damping: float) -> Tensor:
        """The ridge step W + (P - W H) (H + damping * mean(diag H) I)^-1 towards Y, where P = Y X^T / T.

        It never raises |Y - W X|^2, whatever the damping, which only shortens it where the inputs hold little
        energy. (A plain ridge solution P (H + ...)^-1 shrinks W at every application.)

        Args:
            weight: W, (out, in).
            products: P, (out, in).
            damping: above 0.

        Returns:
            (out, in).

        Raises:
            FloatingPointError: see `factor`.
        """
        factor = self.factor(damping).to(weight.dtype)
        gap = products - weight @ self.moment.to(weight.dtype)
        half = torch.linalg.solve_triangular(factor.T, gap, upper=False, left=False)
        return torch.linalg.solve_triangular(factor, half, upper=True, left=False).add_(weight)

    def ridge_inverse(self, ridge: float) -> Tensor:
        """(C + ridge I)^-1, (in, in), where C is H scaled to a unit diagonal: C_ij = H_ij / sqrt(H_ii H_jj).

        A dead input has a zero row and column in C.

        Args:
            ridge: above 0; large enough (0.01, say) for the inverse to be as accurate as its dtype.

        Raises:
            FloatingPointError: H holds NaN or Inf, or C + ridge I is not positive definite.
        """
        if ridge not in self._inverses:
            self._finite_diagonal()
            scale = 1 / live(self.norms)
            scaled = self.moment * scale
            scaled.mul_(scale[:, None]).diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(scaled)
            del scaled
            if failed:
                raise FloatingPointError(
                    f"the second moment of the inputs is not positive definite at ridge {ridge:g}"
                )
            self._inverses[ridge] = torch.cholesky_inverse(factor)
        return self._inverses[ridge]

    def _finite_diagonal(self) -> Tensor:
        diagonal = self._moment.diagonal()
        if not diagonal.isfinite().all():
            raise FloatingPointError("the inputs of the layer hold NaN or Inf, or overflow when squared")
        return diagonal


class Products:
    """Y X^T / T over the T tokens seen so far, for targets Y (out, T) and inputs X (in, T).

    Args:
        outputs: number of targets.
        inputs: number of inputs.
        dtype: in which they are accumulated.
        device: where.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokens = 0
        self.moment = torch.zeros(outputs, inputs, dtype=dtype, device=device)
        """Y X^T / T, (out, in)."""
        self.mean = torch.zeros(outputs, dtype=dtype, device=device)
        """Of the targets, (out,)."""

    @torch.no_grad()
    def update(self, targets: Tensor, inputs: Tensor) -> None:
        """Take more tokens into account; (tokens, out) and (tokens, in)."""
        if not len(inputs):
            return
        dtype = _multiplied_in(self.moment, targets, inputs)
        targets, inputs = targets.to(dtype), inputs.to(dtype)
        self.tokens += len(inputs)
        old, new = 1 - len(inputs) / self.tokens, 1 / self.tokens
        self.mean.mul_(old).add_(targets.sum(dim=0, dtype=self.mean.dtype), alpha=new)
        _add_products(self.moment, targets, inputs, old, new, upper=False)

    def pool(self, summed: Callable[[Tensor], Tensor]) -> None:
        """See `Statistics.pool`."""
        self.tokens = _pool(self.tokens, (self.moment, self.mean), summed)

    def of_rows(self, rows: Tensor | None) -> "Products":
        """Of some of the targets; None are all."""
        if rows is None:
            return self
        rows = rows.to(self.moment.device)
        some = Products(0, 0)
        some.tokens, some.moment, some.mean = self.tokens, self.moment[rows], self.mean[rows]
        return some


def _pool(tokens: int, means: tuple[Tensor, ...], summed: Callable[[Tensor], Tensor]) -> int:
    """Turn means over some tokens into means over all, and give their number."""
    every = int(summed(torch.tensor(tokens)))
    for mean in means:
        summed(mean.mul_(tokens / max(every, 1)))
    return every


def _multiplied_in(moment: Tensor, targets: Tensor, inputs: Tensor) -> torch.dtype:
    """The dtype of the factors of a product that is summed in the dtype of `moment`."""
    if inputs.is_cuda and moment.dtype == torch.float32:
        half = targets.dtype == inputs.dtype == torch.float16
        as_they_are = half or (inputs.dtype == torch.bfloat16 and multiplies_bfloat16(inputs.device))
    else:
        as_they_are = products_cpu.serves(moment, inputs)
    return inputs.dtype if as_they_are else moment.dtype


def _add_products(
    moment: Tensor, targets: Tensor, inputs: Tensor, old: float, new: float, *, upper: bool
) -> None:
    """moment = old moment + new targets^T inputs, for factors in the dtype of `_multiplied_in`; with `upper`,
    for a symmetric result, perhaps only what is not left of the diagonal."""
    if inputs.dtype == moment.dtype:
        step = PANEL if upper else len(moment)
        for start in range(0, len(moment), step):
            rows, columns = slice(start, start + step), slice(start if upper else 0, None)
            moment[rows, columns].addmm_(targets[:, rows].T, inputs[:, columns], beta=old, alpha=new)
    elif inputs.is_cuda:
        moment.mul_(old).add_(torch.mm(targets.T, inputs, out_dtype=moment.dtype), alpha=new)
    else:
        products_cpu.accumulate(moment, targets, inputs, beta=old, alpha=new, upper=upper)


def live(norms: Tensor) -> Tensor:
    """Norms that may be divided by: 1 for dead inputs, whose scaled weights are 0 all the same."""
    return torch.where(norms == 0, 1, norms)


def share_lost(lost: float, energy: float) -> float:
    """The relative error; 0 where there was nothing to lose."""
    # Rounding can take the lost energy below 0.
    return max(lost / energy, 0.0) if energy > 0 else 0.0
