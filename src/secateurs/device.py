"""Devices by name."""

import torch

from secateurs import ranks


def resolve_device(device: str | None) -> torch.device:
    """A device by name, by default a GPU where there is one; ValueError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ValueError(f"'{device}' is no device: use cpu, cuda or cuda:N")
    if where.type == "cuda" and where.index is not None and ranks.world() > 1:
        raise ValueError(
            f"'{device}' is one GPU, and there are {ranks.world()} ranks: use cuda, each has its own"
        )
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device '{device}' ({torch.cuda.device_count()} GPUs here): use cpu")
    return where


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for products of bfloat16 matrices: emulated, they are slow."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def home_of(hidden: list[torch.Tensor], device: torch.device, *, copies: float = 1) -> torch.device:
    """Where activations live between blocks: on the GPU if they leave half of what is free to the work.

    Args:
        hidden: the activations before the first block.
        device: that computes.
        copies: how many times as much is kept there at once.
    """
    if device.type != "cuda":
        return device
    held = sum(states.nbytes for states in hidden)
    free, _ = torch.cuda.mem_get_info(device)
    return device if copies * held < 0.5 * (free + held) else torch.device("cpu")
