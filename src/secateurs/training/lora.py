"""LoRA on a pruned model: what adapters would add to the base's zeros is not there, from the first step on.

Merged, adapters may not fill the zeros of a pruned model. Trained as if it were dense, they lean on what the
merge then drops. So a layer's forward pass adds `x (M * BA)^T` for `x (BA)^T`, where M is 1 where the base is
not zero: what is trained is what is saved. The price is a product of the layer's own size where plain LoRA
has two thin ones: two in the backward pass, one forward. The product of B and A does not outlive the call.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional

from secateurs.training.cutting import running_weight


class _MaskedProduct(torch.autograd.Function):
    """`x (M * BA)^T` with M = base != 0; BA is made again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, near: Tensor, far: Tensor, base: Tensor) -> Tensor:
        """Of x (..., in), A = near (rank, in), B = far (out, rank), base (out, in)."""
        ctx.save_for_backward(x, near, far, base)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x, _masked(far @ near, base).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, near, far, base = ctx.saved_tensors
        above = None
        if ctx.needs_input_grad[0]:
            above = gradient @ _masked(far @ near, base).to(gradient.dtype)
        of_product = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # (out, in)
        of_product = _masked(of_product.to(near.dtype), base)
        return above, far.T @ of_product, of_product @ near.T, None


def _masked(product: Tensor, base: Tensor) -> Tensor:
    return product.masked_fill_(base == 0, 0)


class MaskedLora(LoraVariant):
    """Plain LoRA but for the mask: the same parameters, configuration and files."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        near, far = module.lora_A[active_adapter], module.lora_B[active_adapter]
        base = running_weight(module.get_base_layer())  # of the neurons that run, as A and B
        x = module.lora_dropout[active_adapter](x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        added = _MaskedProduct.apply(
            x, running_weight(near), running_weight(far), base.T if module.fan_in_fan_out else base
        )
        if far.bias is not None:
            added = added + far.bias
        return result + added * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight + _masked(delta, orig_weight)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _masked(module.get_delta_weight(active_adapter), orig_weight.data)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight - _masked(delta, orig_weight)).to(orig_weight.dtype)


def mask_layer(layer: nn.Module) -> None:
    """Mask the adapters of one of PEFT's LoRA layers, those of the kind that know no more than A and B.

    Raises:
        ValueError: there are others (DoRA, say).
    """
    adapters: Any = layer
    for name in adapters.lora_A:
        kind = adapters.lora_variant.get(name)
        if kind is not None and not isinstance(kind, MaskedLora):
            raise ValueError(
                f"the adapter '{name}' is no plain LoRA ({type(kind).__name__}): the zeros of a pruned model "
                "can be kept under plain LoRA only"
            )
        adapters.lora_variant[name] = MaskedLora()
