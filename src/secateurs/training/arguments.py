"""Trainer's settings: our defaults, a YAML file, and what is wrong with them as one line before the work."""

import dataclasses
import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from secateurs.device import resolve_device

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
LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
}


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
        ValueError: the file cannot be read, or says what is no setting of `kind`, or not for it to say.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"'{path}' is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' does not hold Trainer's settings by name")
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name in content:
        if name in TAKEN:
            raise ValueError(f"'{path}': '{name}' is not for this file to say, but for {TAKEN[name]}")
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"'{path}': Trainer has no setting '{name}'{hint}")
    return content


def hardware(device: str | None) -> dict[str, Any]:
    """Trainer's settings for "cpu", "cuda" or the default, with autocast where it pays.

    Raises:
        ValueError: the device is not there, or none to train on.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"'{device}' is no device to train on: use cpu, or cuda with CUDA_VISIBLE_DEVICES to choose a GPU"
        )
    on_gpu = resolve_device(device).type == "cuda"
    return {"use_cpu": not on_gpu, "bf16": on_gpu and torch.cuda.is_bf16_supported()}


def trainer_arguments(kind: type[TrainingArguments], settings: dict[str, Any]) -> TrainingArguments:
    """Settings as Trainer takes them.

    Raises:
        ValueError: Trainer objects to one, or would at its first step.
    """
    from transformers.integrations import get_available_reporting_integrations

    try:
        with warnings.catch_warnings():
            # Its name depends on the version, which is not the user's to mend.
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            arguments = kind(disable_tqdm=True, logging_nan_inf_filter=False, **settings)
        for name, least in LEAST.items():
            if getattr(arguments, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(arguments, name)}")
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"Trainer's settings: {' '.join(str(error).split())}") from None
    available = get_available_reporting_integrations()
    for logger in arguments.report_to or []:
        if logger not in available:
            raise ValueError(
                f"'{logger}' is not installed, or no logger that Trainer knows; installed: "
                f"{', '.join(available) or 'none'}"
            )
    return arguments
