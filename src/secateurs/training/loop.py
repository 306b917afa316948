"""What runs of Trainer here have in common, whatever they train towards."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainerState

from secateurs.checkpoint.config import quiet
from secateurs.training.units import NAMES
from secateurs.training.watch import Over

LOGGED = (
    "step", "seconds", "tokens", "loss", "eval_loss", "omission_rate", "speedup_by_flops", "sparsity",
)  # fmt: skip
SHARES = tuple(f"{units}_kept/" for units in NAMES.values())
"""Behind which comes a block's number: see `SparseTraining.shares_kept`. Said when they change."""


def make_steps(run: Trainer, last: Path | None) -> None:
    """Make the steps that are left."""
    try:
        run.train(resume_from_checkpoint=str(last) if last else None)
    except Over:  # what Trainer does after the last one
        if run.args.load_best_model_at_end and run.state.best_model_checkpoint:
            run._load_best_model()
        run.callback_handler.on_train_end(run.args, run.state, run.control)
        run.is_in_train = False


def merge(model: Any) -> Any:
    return model.merge_and_unload()


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with silent():
        return get_peft_model(model, config)


@contextmanager
def for_training(model: PreTrainedModel) -> Iterator[None]:
    """Nothing is generated in training: keys and values need not be kept, and how to generate is set aside,
    for Trainer's checkpoints would be refused for what does not go together there."""
    config = model.config.get_text_config(decoder=True)
    before = getattr(config, "use_cache", None), model.generation_config
    config.use_cache, model.generation_config = False, GenerationConfig()
    try:
        yield
    finally:
        config.use_cache, model.generation_config = before


@contextmanager
def silent() -> Iterator[None]:
    """Transformers and its bars stay silent beside our own."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what its version and PEFT's disagree on
        yield


def recent_loss(state: TrainerState) -> float:
    """Mean training loss over the last tenth of the steps, as far as it was logged."""
    logged = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    recent = [loss for step, loss in logged if step > 0.9 * state.max_steps] or [logged[-1][1]]
    return sum(recent) / len(recent)


def history(state: TrainerState) -> list[dict[str, float]]:
    """What was logged with each loss: the step, time and tokens until then, and how sparse it was."""
    entries = [
        {name: value for name, value in entry.items() if name in LOGGED or name.startswith(SHARES)}
        for entry in state.log_history
    ]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU, or this process of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
