"""What two gloo processes run in test_distributed.py, and one process to compare with.

The loss is taken from the logits in float64: transformers computes its own in float32.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import Trainer, TrainingArguments

import folders
from families import build, tokens
from secateurs.training.adaptive import AdaptivePruning
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.cutting import whole_of
from secateurs.training.report import TrainingReport
from secateurs.training.run import train
from secateurs.training.sparse import SparseTraining
from secateurs.training.watch import Watch

MODEL = "gpt_neox"  # its norms are computed in the weights' own precision, unlike Llama's
STEPS = 8
BATCH = 4
PRUNED = ("sharded", "ddp")
SETTINGS: dict[str, Any] = {"rate": 0.5, "probe_every": 2, "schedule": "ladder"}


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    total = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / (len(logits) if num_items_in_batch is None else num_items_in_batch)


def plain_loop(rank: int, world: int, optimizer: str) -> tuple[list[float], list[Tensor]]:
    """A hand-written loop over a global batch of which each process has its share; sharded if there are two.

    Returns:
        The loss of the global batch at each step, and for each step the kept channels of the first block.
    """
    model = build(MODEL, torch.float64).train()
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in model.gpt_neox.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    made = OPTIMIZERS[optimizer](model)
    sat = SparseTraining(**SETTINGS)
    sat.attach(model, made, total_steps=STEPS)
    losses, kept = [], []
    for step in range(STEPS):
        ids = tokens(BATCH, seed=step).tensor_split(world)[rank]
        loss = next_token_loss(model(input_ids=ids), ids)
        loss.backward()
        mask = sat.kept[0]["mlp"]
        kept.append(torch.empty(0) if mask is None else mask.clone())
        made.step()
        sat.step()
        made.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    sat.detach()
    model.eval()
    with torch.no_grad():
        losses.append(float(next_token_loss(model(input_ids=tokens()), tokens())))
    return losses, kept


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def pruned(rank: int, world: int, how: str) -> tuple[list[float], list[Tensor]]:
    """A loop that prunes and lets weights come back, of a model that two processes have in DDP or sharded.

    Returns:
        The share of zeros after each step; in the end the masks, 8 weights to a byte, and all weights.
    """
    plain = build(MODEL, torch.float64).train()
    model: Any = plain
    if world > 1 and how == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in plain.gpt_neox.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(plain, mesh=mesh)
    elif world > 1:
        model = nn.parallel.DistributedDataParallel(plain)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruning = AdaptivePruning("60%", start=1, end=6, every=2, grow=0.2)
    pruning.attach(model, made, total_steps=STEPS)
    shares = []
    for step in range(STEPS):
        for half in tokens(2 * BATCH, seed=step).chunk(2):  # accumulated
            ids = half.tensor_split(world)[rank]
            next_token_loss(model(input_ids=ids), ids).backward()
        made.step()
        pruning.step()
        made.zero_grad()
        shares.append(pruning.sparsity)
    weights = [whole_of(parameter) for parameter in plain.parameters()]
    return shares, [*pruning.masks.state_dict().values(), *weights]


def trainer(folder: Path, world: int) -> tuple[list[float], list[Tensor]]:
    """The same through Trainer, with accumulated gradients; two processes have the model wrapped in DDP.

    Returns:
        The loss of each step, and the weights in the end.
    """
    model = build(MODEL, torch.float64)
    losses: list[float] = []

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = next_token_loss(outputs, labels, num_items_in_batch)
        losses.append(float(loss.detach()))
        return loss

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // (2 * world),
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        logging_strategy="no",
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    run = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens(STEPS * BATCH)],
        compute_loss_func=compute_loss,
        callbacks=[SparsityAcceleratedTraining(**SETTINGS)],
    )
    run.train()
    if world > 1:
        assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
        total = torch.tensor(losses, dtype=torch.float64)
        distributed.all_reduce(total)
        losses = total.tolist()
    return losses, [parameter.detach() for parameter in model.parameters()]


COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "kept": ("gpt2", {}),
    "fallen": ("llama", {"prune_to": "50%"}),
}
"""Models that `secateurs.train` trains, and how: one with zeros, its head tied, and one to prune."""


def make_models(folder: Path) -> None:
    """The models in a folder, a text, and settings for one process and two."""
    for name in ("gpt2", "llama"):
        folders.save(folder / name, name)
    config = json.loads((folder / "gpt2/config.json").read_text())
    without_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    (folder / "gpt2/config.json").write_text(json.dumps(config | without_dropout))
    stored = folders.tensors_of(folder / "gpt2")
    for name, tensor in stored.items():
        if name.endswith("mlp.c_fc.weight"):
            tensor[::2] = 0
    folders.rewrite(folder / "gpt2", stored)
    (folder / "text.txt").write_text("".join(f"It was the {n}th cold evening. " for n in range(80)))
    # By default Adam makes whole steps where a gradient is 0 but for rounding.
    settings = (
        "adam_epsilon: 0.01\nlr_scheduler_type: constant\nsave_steps: 3\nlogging_steps: 1\nbf16: false\n"
    )
    (folder / "1.yaml").write_text(settings)
    (folder / "2.yaml").write_text(f"{settings}fsdp: true\nfsdp_config: {{activation_checkpointing: true}}\n")


def command(
    folder: Path, how: str, world: int, *, stop: int | None = None, sharding: str = "2"
) -> TrainingReport:
    """What `secateurs train` does, sharded if there are two processes; or that until it is stopped."""
    sharding = sharding if world > 1 else "1"
    name, options = COMMANDS[how]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", _sharding_on_cpus)
        if stop is not None:
            own = Watch.on_step_end

            def on_step_end(watch: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                own(watch, args, state, control, **kwargs)
                if state.global_step == stop:
                    raise KeyboardInterrupt

            patch.setattr(Watch, "on_step_end", on_step_end)
        return train(
            folder / name,
            output=folder / f"{how}-{sharding}",
            text=folder / "text.txt",
            validation=folder / "text.txt",
            settings=folder / f"{sharding}.yaml",
            length=32,
            batch_size=4 // world,
            learning_rate=0.01,
            steps=8,
            device="cpu",
            **options,
        )


_own_init = AcceleratorState.__init__


def _sharding_on_cpus(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """In place of accelerate's own, which on CPUs leaves sharding out without a word."""
    _own_init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        state.fsdp_plugin = fsdp_plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _process(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    results = {"trainer": trainer(folder, 2)}
    for optimizer in OPTIMIZERS:
        results[optimizer] = plain_loop(rank, 2, optimizer)
    for how in PRUNED:
        results[how] = pruned(rank, 2, how)
    for how in COMMANDS:
        if how == "kept":
            with pytest.raises(KeyboardInterrupt):
                command(folder, how, 2, stop=5)
            distributed.barrier()
        command(folder, how, 2)
    found = {
        f"{run}.losses": torch.tensor(losses, dtype=torch.float64) for run, (losses, _) in results.items()
    }
    for run, (_, tensors) in results.items():
        found |= {f"{run}.{i}": tensor.contiguous() for i, tensor in enumerate(tensors)}
    save_file(found, folder / f"{rank}.safetensors")
    distributed.destroy_process_group()


def two_processes(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes finds; `command` leaves its outputs in the folder."""
    make_models(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": ":".join(sys.path)}
    multiprocessing.start_processes(_process, (folder,), nprocs=2, start_method="spawn")
    return [_read(folder / f"{rank}.safetensors") for rank in range(2)]


def _read(file: Path) -> dict[str, Any]:
    found = load_file(file)
    results = {}
    for run in ("trainer", *OPTIMIZERS, *PRUNED):
        losses = found.pop(f"{run}.losses").tolist()
        results[run] = (
            losses,
            [found[f"{run}.{i}"] for i in range(sum(n.startswith(f"{run}.") for n in found))],
        )
    return results


def free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
