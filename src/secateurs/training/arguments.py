"""Trainer's settings: our defaults, a YAML file, and what is wrong with them as one line before the work."""

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import math
import os
import tempfile
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from secateurs.checkpoint import read_json
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.settings import fitted, read_yaml

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "seed": 0,
    "logging_steps": 0.01,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
}
CHAT_DEFAULTS = {"gradient_checkpointing": False}  # TRL's is True
LORA_DEFAULTS = {"learning_rate": 2e-4}

# What a settings file may not say, and what says it.
TAKEN = {
    "output_dir": "--output",
    "resume_from_checkpoint": "the same command again",
    "max_length": "--length",
    "use_cpu": "--device",
}
# What it may not ask for, and why.
SCRIPTS = "parameters are held whole here, or sharded by fsdp or deepspeed (docs/training.md)"
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""Where accelerate keeps whether FSDP or DeepSpeed shards."""
FOLDERS = "that is a matter of the model's folder"
ABSENT = {
    "parallelism_config": SCRIPTS,
    **dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), FOLDERS),
    **dict.fromkeys(("packing", "eval_packing", "padding_free"), "a row is one conversation"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "the loss is always the answers'"),
    **dict.fromkeys(("save_only_model", "ignore_data_skip"), "the same command could not go on from there"),
    **dict.fromkeys(("label_names", "include_num_input_tokens_seen"), "that follows from the data"),
    **dict.fromkeys(("disable_tqdm", "logging_nan_inf_filter"), "progress and losses are looked after"),
    "push_to_hub": "upload the output folder when it is there (hf upload)",
}
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
}
PACKAGES = {
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit"), "bitsandbytes"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), "bitsandbytes"),
    **dict.fromkeys(("paged_ademamix_8bit", "paged_ademamix_32bit"), "bitsandbytes"),
    **dict.fromkeys(("paged_lion_8bit", "paged_lion_32bit"), "bitsandbytes"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), "bitsandbytes"),
}
"""Optimisers of other packages, which Trainer misses only when data have been read."""
ABOVE_ZERO = ("num_train_epochs", "logging_steps", "save_steps")
METRICS = ("loss", "mean_token_accuracy", "entropy")
OPTIONAL = {"max_steps": -1, "save_total_limit": None}
"""At least 1, or what stands for none."""


def arguments_kind(chat: bool) -> type[TrainingArguments]:
    """What holds Trainer's settings: for conversations TRL's."""
    if not chat:
        return TrainingArguments
    from trl import SFTConfig

    kind: type[TrainingArguments] = SFTConfig
    return kind


def read_settings(path: Path, kind: type[TrainingArguments]) -> dict[str, Any]:
    """Trainer's settings by name from a YAML file.

    Raises:
        ValueError: the file cannot be read, or says what is no setting of `kind`, or not for it to say, or a
            value of another type, or an optimiser whose package is missing.
    """
    content = read_yaml(path)
    hints = {**get_type_hints(kind), "fsdp": bool | str | None}  # its annotation has no switch yet
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name, value in content.items():
        if name in TAKEN:
            raise ValueError(f"'{path}': '{name}' is not for this file to say, but for {TAKEN[name]}")
        if name in ABSENT and value:
            raise ValueError(f"'{path}': there is no '{name}' here: {ABSENT[name]}")
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"'{path}': Trainer has no setting '{name}'{hint}")
        try:
            content[name] = _fitted(value, hints[name])
        except TypeError as error:
            raise ValueError(f"'{path}': '{name}' is {error}") from None
    optimiser = str(content.get("optim"))
    needs = {f"optim {optimiser}": PACKAGES.get(optimiser)}
    if isinstance(content.get("deepspeed"), str):  # its content decides the run, not its name
        try:
            content["deepspeed"] = read_json(Path(content["deepspeed"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"'{path}': deepspeed: {error}") from None
    if content.get("deepspeed"):
        if not isinstance(content["deepspeed"], dict):
            raise ValueError(f"'{path}': deepspeed is a table, or the name of a JSON file that holds one")
        needs["deepspeed"] = "deepspeed"
    for what, package in needs.items():
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"'{path}': {what} needs {package}, which is not installed: pip install {package}"
            )
    return content


def _fitted(value: Any, annotation: Any) -> Any:
    """A value as a field of Trainer's wants it; where that may be a list or a table, Trainer judges."""
    several = get_origin(annotation) in (Union, types.UnionType)
    kinds = get_args(annotation) if several else (annotation,)
    if not {bool, int, float, str, types.NoneType}.issuperset(kinds):
        return value
    if isinstance(value, str) and str not in kinds:  # a number in quotes
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and value.is_integer() and float not in kinds:
        value = int(value)
    return fitted(value, annotation)


def hardware(device: str | None) -> dict[str, Any]:
    """Trainer's settings for "cpu", "cuda" or the default, with autocast where it pays.

    Raises:
        ValueError: the device is not there, or none to train on.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"'{device}' is no device to train on: use cpu, or cuda with CUDA_VISIBLE_DEVICES to choose a GPU"
        )
    found = resolve_device(device)
    return {"use_cpu": found.type == "cpu", "bf16": multiplies_bfloat16(found)}


def trainer_arguments(kind: type[TrainingArguments], settings: dict[str, Any]) -> TrainingArguments:
    """Settings as Trainer takes them.

    Raises:
        ValueError: Trainer objects to one, or would in training.
    """
    from transformers.integrations import get_available_reporting_integrations

    launched = os.environ.keys() & SHARDING
    try:
        if settings.get("deepspeed") and "RANK" not in os.environ:
            raise ValueError("deepspeed is for several processes: start training with torchrun")
        _check_numbers(settings)
        with warnings.catch_warnings():
            # Its name depends on the version, which is not the user's to mend.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            arguments = kind(disable_tqdm=True, logging_nan_inf_filter=False, **settings)
        available = get_available_reporting_integrations()
        for logger in arguments.report_to or []:
            if logger not in available:
                raise ValueError(
                    f"'{logger}' is not installed, or no logger that Trainer knows; installed: "
                    f"{', '.join(available) or 'none'}"
                )
        _rehearse(arguments)
    except Exception as error:  # of whatever kind: nothing but the settings can be at fault yet
        for name in set(SHARDING) - launched:  # what is put there would shard the next run of this process
            os.environ.pop(name, None)
        raise ValueError(f"Trainer's settings: {' '.join(str(error).split())}") from error
    return arguments


def _check_numbers(settings: dict[str, Any]) -> None:
    """Raises ValueError for numbers that Trainer takes and then fails at, or takes for others."""
    for name, least in LEAST.items():
        if not settings.get(name, 1) >= least:
            raise ValueError(f"{name} is at least {least}, not {settings[name]}")
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is a finite number, not {value}")
    for name in ABOVE_ZERO:
        if not settings.get(name, 1) > 0:
            raise ValueError(f"{name} is above 0, not {settings[name]}")
    for name, none in OPTIONAL.items():
        if settings.get(name, none) != none and settings[name] < 1:
            raise ValueError(f"{name} is at least 1, not {settings[name]}")
    metric = str(settings.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if metric not in METRICS:
        raise ValueError(f"metric_for_best_model is one of {', '.join(METRICS)}, not {metric}")


def is_sharded() -> bool:
    """Whether FSDP or DeepSpeed shards what a Trainer trains, by its arguments or by what launched it.

    It is known once there are `trainer_arguments`.
    """
    return AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_by_deepspeed() -> bool:
    """Whether it is DeepSpeed."""
    return AcceleratorState().distributed_type == DistributedType.DEEPSPEED


@contextmanager
def state_restored() -> Iterator[None]:
    """What accelerate keeps for a whole process is as before once this is left. Otherwise a Trainer that is
    made then, of arguments that were there before, would be refused for another precision."""
    state = AcceleratorState._shared_state
    before = dict(state)
    try:
        yield
    finally:
        state.clear()
        state.update(before)


@contextmanager
def set_aside(arguments: TrainingArguments) -> Iterator[TrainingArguments]:
    """Arguments for a Trainer that leaves nothing behind and tells no logger."""
    with tempfile.TemporaryDirectory() as folder:
        other = copy.copy(arguments)
        other.output_dir, other.report_to = folder, []
        yield other


def _rehearse(arguments: TrainingArguments) -> None:
    """Make all that a Trainer makes of its settings, for a model of no size: it objects only then."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    row = {"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64)}
    with set_aside(arguments) as others, torch.random.fork_rng(devices=[]):
        trainer = Trainer(LlamaForCausalLM(config), others, train_dataset=[row], eval_dataset=[row])
        if is_by_deepspeed():  # accelerate keeps what it was given, and objects to being given it again
            arguments.deepspeed_plugin = None
        if arguments.fsdp and not is_sharded():
            raise ValueError("fsdp is for several processes with a GPU each: start training with torchrun")
        if is_sharded() and not (trainer.accelerator.is_fsdp2 or is_by_deepspeed()):
            raise ValueError("version 1 of FSDP owns the weights' shapes: say version: 2 in fsdp_config")
        trainer.create_optimizer_and_scheduler(num_training_steps=10)
        trainer.get_train_dataloader()
        if arguments.use_liger_kernel:
            apply_liger_kernel(trainer.model, arguments.liger_kernel_config)
        if arguments.torch_compile:  # which needs a compiler
            mode, backend = arguments.torch_compile_mode, arguments.torch_compile_backend
            compiled = torch.compile(torch.sin, mode=mode, backend=backend or "inductor")
            compiled(torch.zeros(8, device=arguments.device))
