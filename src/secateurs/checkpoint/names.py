"""Names in the files, held against what the model has: nothing may be missing, whoever wrote the folder.

transformers gives a random value to what it does not find and goes on. So it is asked beforehand: it loads
the model from tensors without content, of the names and shapes that the files have, by all its own rules
about old names, prefixes, fused experts and tied weights, and reports.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateurs.checkpoint.config import is_compressed, model_class, quiet, read_config, short
from secateurs.checkpoint.reading import Checkpoint

WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
"""What torch.compile, DDP, FSDP, activation checkpointing and PEFT leave in names, wherever they wrapped."""

ADAPTERS = re.compile(r"(?<![^.])(lora|ia3|oft|boft|vera|hada|lokr)_\w+|(?<![^.])modules_to_save\.")
"""What PEFT calls what it trains."""


def skeleton_of(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model on the meta device, made sure that the files hold all of it.

    Where the names are the model's but for what a wrapper left in them, the checkpoint's tensors are renamed:
    from then on they go, and are written, by the model's own names.

    Raises:
        ValueError: transformers cannot make the model of the configuration; a tensor is missing or of another
            shape; adapters are not merged.
    """
    config = read_config(checkpoint)
    for setting in ("quantization_config", "transformers_weights"):
        if hasattr(config, setting):
            delattr(config, setting)  # the dense model, whatever its layers are stored as
    kind, config = model_class(config)
    folder, behind = checkpoint.folder, ""
    try:
        model, missing, mismatched = _load(kind, config, checkpoint)
        if missing:
            behind = _rename(checkpoint, model, missing[0])
            model, missing, mismatched = _load(kind, config, checkpoint)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"'{folder}' does not hold what its config.json describes ({config.model_type}): {short(error)}"
        ) from error
    if missing:
        raise ValueError(f"'{folder}' holds no tensor '{missing[0]}'{behind}")
    if mismatched and not is_compressed(checkpoint):
        name, stored, shape = mismatched[0]
        raise ValueError(
            f"'{name}' has shape {tuple(stored)} in '{folder}', its config.json asks for {tuple(shape)}"
        )
    if (folder / "adapter_config.json").exists():
        warnings.warn(
            f"'{folder}' also holds adapters, which are left aside: merge them into the weights first if "
            "they are not in them already",
            stacklevel=2,
        )
    return model


def promised_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of the dense tensors, by their names in the files.

    What is packed is there as promised, or is refused where it is unpacked.
    """
    shapes = dict(checkpoint.shapes)
    if is_compressed(checkpoint):
        layers = checkpoint.config["quantization_config"].get("layers")
        for name, entry in layers.items() if isinstance(layers, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                shapes[f"{name}.weight"] = tuple(entry["shape"])
    return shapes


def load_empty(
    kind: type[PreTrainedModel], config: Any, tensors: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of tensors without content, and transformers' report on which are missing or do not fit.

    Args:
        kind: the model's class.
        config: of the dense model.
        tensors: on the meta device, by the names in the files.
    """
    loader: Any = kind  # its types forget that it returns a pair here
    with quiet():
        model, report = loader.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, report


def _load(
    kind: type[PreTrainedModel], config: Any, checkpoint: Checkpoint
) -> tuple[PreTrainedModel, list[str], list[tuple[str, torch.Size, torch.Size]]]:
    """A model of empty tensors; what it misses, and what has another shape in the files and in the model."""
    shapes = promised_shapes(checkpoint)
    model, report = load_empty(
        kind, config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    order = {name: i for i, name in enumerate(model.state_dict())}
    missing = sorted(report["missing_keys"], key=lambda name: order.get(name, -1))
    return model, missing, sorted(report["mismatched_keys"], key=lambda entry: order.get(entry[0], -1))


def _rename(checkpoint: Checkpoint, model: PreTrainedModel, missing: str) -> str:
    """Take what wrappers left out of a checkpoint's names, and tell what was found, for an error's end.

    The model's own names are looked for at the end of the stored ones. What stands before most of them is the
    prefix; it is taken off wherever it stands.

    Args:
        checkpoint: its tensors are renamed.
        model: knows which names there are.
        missing: one of those that are not.
    """
    folder = checkpoint.folder
    adapter = next((name for name in checkpoint.file_of if ADAPTERS.search(name)), None)
    if adapter:
        raise ValueError(
            f"'{folder}' holds adapters that are not merged ('{adapter}'): merge them into the weights first "
            "(merge_and_unload in PEFT)"
        )
    base = f"{model.base_model_prefix}."
    known = set(model.state_dict())
    known |= {name.removeprefix(base) for name in known}  # as the bare model's files call them
    plain = {name: WRAPPERS.sub("", name) for name in checkpoint.file_of}
    counts: Counter[str] = Counter()
    for name in plain.values():
        for dot in (-1, *(match.start() for match in re.finditer(r"\.", name))):
            if name[dot + 1 :] in known:
                counts[name[: dot + 1]] += 1
    if not counts:
        return f": its names are other ones ('{min(checkpoint.file_of, default='')}')"
    most = max(counts.values())
    prefix = min((prefix for prefix in counts if counts[prefix] == most), key=len)
    rivals = [p for p in counts if counts[p] == most and not p.startswith(prefix)]
    renamed = {name: short_name.removeprefix(prefix) for name, short_name in plain.items()}
    if rivals or len(set(renamed.values())) < len(renamed):
        several = " and ".join(f"'{p}'" for p in [prefix, *rivals])
        raise ValueError(
            f"'{folder}' holds no tensor '{missing}', but more than one of such a name, behind {several}: "
            "save one model by its own names"
        )
    checkpoint.rename(renamed)
    return f", nor behind '{prefix}', with which its names begin" if prefix else ""
