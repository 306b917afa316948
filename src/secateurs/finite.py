"""NaN and Inf in whole tensors."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor Inf.

    By its least and its greatest value: one pass, where `isfinite` fills several tensors as large.
    """
    if not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8, which has no order in torch
        tensor = tensor.float()
    return all(bound.isfinite() for bound in torch.aminmax(tensor))
