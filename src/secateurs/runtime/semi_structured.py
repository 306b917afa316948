"""2:4 layers of a compressed model as torch's semi-structured tensors: of the same size, for many tokens."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateurs.runtime.format import mask_of
from secateurs.runtime.linear import SparseLinear


def is_two_of_four(mask: Tensor) -> bool:
    """Whether no four neighbouring columns of a bitmask (rows, row_mask_bytes) keep more than two weights."""
    bit = torch.arange(4, dtype=torch.uint8, device=mask.device)
    nibbles = torch.stack([mask & 15, mask >> 4])
    return bool(((nibbles[..., None] >> bit & 1).sum(-1) <= 2).all())


def to_semi_structured(model: PreTrainedModel) -> int:
    """Replaces the 2:4 layers of a compressed model on a GPU by torch's semi-structured ones.

    The model can no longer be saved compressed.

    Returns:
        How many layers were replaced.

    Raises:
        ValueError: the model is not on a GPU that multiplies 2:4 weights (compute capability 8.0 or newer).
    """
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        raise ValueError(
            f"no 2:4 tensor cores on {model.device}: they need a GPU of compute capability 8.0 or newer"
        )
    replaced = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, SparseLinear) or module.layout.codes is not None:
            continue
        if not is_two_of_four(mask_of(module.weight, module.layout)):
            continue
        if module.out_features % 32 or module.in_features % 64 or module.layout.dtype == torch.float32:
            continue  # shapes and dtypes that torch's kernels do not take
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
        weight = torch.sparse.to_sparse_semi_structured(module.dense_weight())
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear)
        replaced += 1
    return replaced
