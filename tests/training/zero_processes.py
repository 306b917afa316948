"""What two gloo processes run in test_zero.py under DeepSpeed, and one process to compare with."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, multiprocessing
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from two_processes import SETTINGS, command, free_port, make_models

from families import build, tokens
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.cutting import whole_of

STAGES = (1, 2, 3)
STEPS, BATCH = 8, 4
METRICS = {1: "fisher", 2: "magnitude", 3: "weighted"}
COMMANDS = (3, 2)
"""The stages by which `secateurs.train` trains; the first is stopped on the way."""


def config(stage: int) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # No parameter is so small that every process has it.
    sharding = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": sharding, **dict.fromkeys(auto, "auto")}


def trainer(folder: Path, world: int, stage: int) -> tuple[list[float], list[Tensor]]:
    """A run of Trainer with sparse steps and accumulated gradients, by ZeRO if there are two processes.

    Returns:
        The loss of each step, and the weights in the end.
    """
    model = build("llama")  # before there are arguments, which would have transformers shard it
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // (2 * world),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=0.01,  # by default Adam makes whole steps where a gradient is 0 but for rounding
        weight_decay=0.1,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        deepspeed=config(stage) if world > 1 else None,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(STEPS * BATCH)]
    sparse = SparsityAcceleratedTraining(**SETTINGS, importance=METRICS[stage])
    run = Trainer(model, arguments, train_dataset=rows, callbacks=[sparse])
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, [whole_of(parameter) for parameter in model.parameters()]


def _process(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed

    # Gloo does what this would, which a compiler makes when it is first used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {}
    for stage in STAGES:
        found[stage] = trainer(folder / f"trainer-{stage}", 2, stage)
        _forget()
    for stage in COMMANDS:
        if stage == COMMANDS[0]:
            with pytest.raises(KeyboardInterrupt):
                command(folder, "kept", 2, stop=5, sharding=f"zero{stage}")
            distributed.barrier()
            _forget()
        command(folder, "kept", 2, sharding=f"zero{stage}")
        _forget()
        command(folder, "kept", 2, sharding=f"low{stage}")
        _forget()
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _forget() -> None:
    """Let a process train in another way."""
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def two_processes(folder: Path) -> list[dict[int, tuple[list[float], list[Tensor]]]]:
    """What each of two processes finds; `command` leaves its outputs in the folder."""
    make_models(folder)
    common = (folder / "1.yaml").read_text()
    for stage in COMMANDS:
        (folder / f"zero{stage}.yaml").write_text(f"{common}deepspeed: {config(stage)}\n")
        low = {**config(stage), "bf16": {"enabled": "auto"}}
        (folder / f"low{stage}.yaml").write_text(
            f"{common.replace('bf16: false', 'bf16: true')}\ndeepspeed: {low}\n"
        )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": ":".join(sys.path)}
    multiprocessing.start_processes(_process, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
