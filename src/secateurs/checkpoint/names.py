"""Names in the files, held against what the model has: nothing may be missing, whoever wrote the folder.

transformers gives a random value to what it does not find and goes on. So it is asked beforehand: it loads
the model from tensors without content, of the names and shapes that the files have, by all its own rules
about old names, prefixes, fused experts and tied weights, and reports.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from secateurs.checkpoint.config import (
    is_compressed,
    model_class,
    quiet,
    read_config,
    short,
    without_deepspeed,
)
from secateurs.checkpoint.reading import Checkpoint
from secateurs.checkpoint.shards import Stored

WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)
"""What torch.compile, DDP, FSDP, activation checkpointing and PEFT leave in names, wherever they wrapped."""

ADAPTERS = re.compile(r"(?<![^.])(lora|ia3|oft|boft|vera|hada|lokr)_\w+|(?<![^.])modules_to_save\.")
"""What PEFT calls what it trains."""

PACKED_EXPERTS = "_packed.weight"
"""What a compressed model adds to the name of a parameter that holds experts: no conversion knows it."""

PACKED_VALUES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How safetensors calls what `config.json` calls the dtypes of packed values."""


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
    except Exception as error:  # of whatever kind the model's code stumbles into
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


def own_names(keys: Iterable[str], model: PreTrainedModel, more: Iterable[str] = ()) -> dict[str, str]:
    """What transformers' loader makes of names in files: the model's own names for them.

    Args:
        keys: names in files.
        model: on any device.
        more: names that the model knows besides those of its state.

    Returns:
        Key -> name; of several that a tensor is split into, the first. What the model does not know keeps its
        name, or has it changed in vain.
    """
    known = dict.fromkeys([*model.state_dict(), *more], True)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    names: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings count on this order
        names[key], _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if names[key] not in known:
            names[key], _ = rename_source_key(key, [], [], model.base_model_prefix, known)
    return names


def packed_names(model: PreTrainedModel) -> list[str]:
    """What the parameters of a dense model that may hold experts are called when they are packed."""
    return [f"{name}{PACKED_EXPERTS}" for name, tensor in model.state_dict().items() if tensor.dim() > 1]


def promised_tensors(checkpoint: Checkpoint, model: PreTrainedModel | None) -> dict[str, Stored]:
    """The dense tensors, by their names in the files.

    What is packed is there as promised, or is refused where it is unpacked.

    Args:
        checkpoint: the model's files.
        model: of its class, dense. Not needed where nothing is packed.
    """
    tensors = {name: Stored(checkpoint.dtypes[name], shape) for name, shape in checkpoint.shapes.items()}
    if not is_compressed(checkpoint):
        return tensors
    assert model is not None
    layers = checkpoint.config["quantization_config"]["layers"]
    packed = {f"{name}{PACKED_EXPERTS if 'stored' in layers[name] else '.weight'}": name for name in layers}
    known, shapes = packed_names(model), {name: tuple(x.shape) for name, x in model.state_dict().items()}
    bytes_ = [name for name in tensors if tensors[name].dtype == "U8"]
    stored = {name: key for key, name in own_names(bytes_, model, known).items()}
    for key, name in own_names(packed, model, known).items():
        entry = layers[packed[key]]
        dtype = PACKED_VALUES.get(entry.get("dtype", entry["values"]), "U8")
        if "stored" not in entry:
            tensors[stored.get(name, key)] = Stored(dtype, shapes.get(name, tuple(entry["shape"])))
            continue
        tensors.pop(stored.get(name, key), None)
        for each, shape in expanded(entry["stored"], len(entry["nonzeros"])).items():
            tensors[each] = Stored(dtype, shape)
    return tensors


def expanded(stored: Mapping[str, Iterable[int]], experts: int) -> dict[str, tuple[int, ...]]:
    """Shapes by names that have an asterisk for an expert's number -> by all names."""
    return {
        name.replace("*", str(expert)): tuple(shape)
        for name, shape in stored.items()
        for expert in (range(experts) if "*" in name else range(1))
    }


def abbreviated(stored: Mapping[str, tuple[int, ...]], experts: int) -> dict[str, tuple[int, ...]]:
    """The same backwards, for the names of one parameter's tensors."""
    short_of: dict[str, str] = {}
    for name in stored:
        parts = name.split(".")
        for side in (i for i, part in enumerate(parts) if part.isdigit()):
            pattern = ".".join([*parts[:side], "*", *parts[side + 1 :]])
            each = expanded({pattern: stored[name]}, experts)
            if all(stored.get(key) == shape for key, shape in each.items()):
                short_of[name] = pattern
    return {short_of.get(name, name): shape for name, shape in stored.items()}


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
    with quiet(), without_deepspeed():
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
    dense = load_empty(kind, config, {})[0] if is_compressed(checkpoint) else None
    tensors = promised_tensors(checkpoint, dense)
    model, report = load_empty(
        kind, config, {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
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
