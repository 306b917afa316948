"""What several gloo processes run in test_ranks.py: one after another, as two or as three ranks."""

import errno
import io
import math
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from families import tokens
from secateurs import Statistics, cli, evaluate, prune, ranks, recover
from secateurs.checkpoint.shards import Shards
from secateurs.evaluation.perplexity import perplexity
from secateurs.pruning.block import refine
from secateurs.pruning.folder import WorkFolder

MOST = 3
BROKEN = "a rank breaks off"

Found = dict[str, Any]


def calibration() -> torch.Tensor:
    """(32, 64) ids: three ranks cannot have as many each; every eighth token is the same for any number."""
    return tokens(32, 64)


def few() -> torch.Tensor:
    """(8, 64) ids, which one step of the descent sees, whatever the number of ranks."""
    return tokens(8, 64)


def statistics(rank: int, inputs: torch.Tensor) -> Found:
    """Of a share of some tokens, pooled."""
    with ranks.together():
        own = Statistics.from_inputs(ranks.share_of(inputs))
        ranks.pool(own)
    return {"moment": own.moment, "mean": own.mean, "count": own.tokens}


def sharing(rank: int) -> Found:
    """Tasks of one rank that fail, and those that do not."""
    device = torch.device("cpu")

    def square(number: int, rows: torch.Tensor | None) -> tuple[int, int, list[int] | None]:
        if number < 0:
            raise FloatingPointError(f"no square of {number} on rank {rank}")
        return number * number, os.getpid(), None if rows is None else rows.tolist()

    def of(*numbers: int, rows: int = 1) -> list[list[tuple[int, int, list[int] | None]]]:
        tasks = deque(ranks.Task(abs(number), partial(square, number), rows) for number in numbers)
        return list(ranks.shared_out(tasks, device))

    with ranks.together():
        found = {
            "squares": of(7, 1, 3, 4),
            "few rows": of(5, 4, rows=2 * ranks.LEAST_ROWS - 1),
            "rows": of(5, 1, rows=2 * ranks.LEAST_ROWS),
            "free": [[rows for _, _, rows in parts] for parts in of(0, rows=2 * ranks.LEAST_ROWS)],
        }
        with pytest.raises(FloatingPointError) as error:
            of(5, -4)
    return {**found, "error": str(error.value)}


def averaged(rank: int, vectors: torch.Tensor, weights: list[int]) -> Found:
    """The mean of vectors, of three lengths."""
    own = vectors[rank].clone().split([12, 6, 5])
    with ranks.together():
        return {"mean": ranks.averaged(own, weights[rank])}


def descended(rank: int, model: Path, output: Path) -> Found:
    """A run whose steps see less of each sequence, the more ranks there are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refine, "TOKENS_A_STEP", 64)
        patched.setattr(refine, "SHORTEST", 16)
        settings = {"method": "magnitude", "target": "block", "pattern": "50%", "refine": 4}
        report = prune(model, output=output, calibration=tokens(9, 64), **settings)
    return {"error": report.error, "sparsity": report.sparsity}


def pruned(rank: int, model: Path, output: Path, settings: Found) -> Found:
    """A run of `prune`."""
    report = prune(model, output=output, **{"calibration": calibration(), **settings})
    return {"error": report.error, "sparsity": report.sparsity, "output": str(report.output)}


def divided(rank: int, model: Path, output: Path, settings: Found) -> Found:
    """A run of `prune` on matrices that are all divided where ranks would wait."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks, "LEAST_ROWS", 8)
        return pruned(rank, model, output, settings)


def recovered(rank: int, model: Path, pruned: Path, output: Path) -> Found:
    """A run of `recover`, in which Trainer shares the steps out."""
    settings = {"calibration": tokens(24, 32), "tokens": 2_048, "learning_rate": 3e-3, "device": "cpu"}
    report = recover(pruned, towards=model, output=output, **settings)
    return {"before": report.before, "after": report.after, "steps": report.steps}


def measured(rank: int, model: Path, text: Path) -> Found:
    """Perplexity."""
    figures = evaluate(model, text=[text], length=32, batch_size=2)
    (found,) = [(figure.value, ranks.world()) for figure in figures]
    return dict(zip(("perplexity", "world"), found, strict=True))


def broken_off(rank: int, model: Path, output: Path, settings: Found) -> Found:
    """A run in which one rank ends after the second block."""

    def write_block(self: WorkFolder, index: int, *args: Any) -> None:
        if rank == 1 and index == 1:
            raise RuntimeError(BROKEN)
        write(self, index, *args)

    write = WorkFolder.write_block
    WorkFolder.write_block = write_block  # type: ignore[method-assign]
    try:
        prune(model, output=output, calibration=calibration(), **settings)
    except (RuntimeError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        WorkFolder.write_block = write  # type: ignore[method-assign]
    return {"error": None}


def not_finite(rank: int, model: Path) -> Found:
    """What each rank says of a window, in another's share, whose loss is not finite."""
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[-1] = math.nan
    text = torch.zeros(128, dtype=torch.int64)
    text[40] = len(broken.get_input_embeddings().weight) - 1
    with ranks.together():
        with pytest.raises(FloatingPointError) as error:
            perplexity(broken, text, length=16)
        return {"error": str(error.value), "world": ranks.total(1)}


def unwritten(rank: int, model: Path, output: Path) -> Found:
    """What each rank says where the main one cannot write a block."""

    def write(self: Shards, tensors: Any) -> None:
        raise PermissionError(errno.EACCES, "no such right")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "write_outside", lambda self: None)
        patch.setattr(Shards, "write", write)
        with pytest.raises(OSError, match="right") as error:
            prune(model, output=output, calibration=calibration(), method="wanda", pattern="50%")
    return {"error": str(error.value)}


def mistaken(rank: int, arguments: list[str]) -> Found:
    """What the command line says and ends with."""
    sys.argv = ["secateurs", *arguments]
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.main()
    return {"said": said.getvalue(), "code": end.value.code}


class Job(tuple[str, int, Callable[..., Found], tuple[Any, ...]]):
    """Its name, its ranks, and what each of them runs with which arguments."""


def _process(rank: int, folder: Path, jobs: list[Job], ports: list[int]) -> None:
    torch.set_num_threads(1)
    for (name, world, run, arguments), port in zip(jobs, ports, strict=True):
        if rank < world:
            os.environ |= {
                **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
                **{name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            torch.save(run(rank, *arguments), folder / f"{name}-{rank}.pt")
            ranks.disconnect()


def run_in_ranks(folder: Path, jobs: list[Job]) -> dict[str, list[Found]]:
    """What each rank finds in each job."""
    os.environ["PYTHONPATH"] = ":".join(sys.path)
    ports = _free_ports(len(jobs))
    multiprocessing.start_processes(_process, (folder, jobs, ports), nprocs=MOST, start_method="spawn")
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]
        for name, world, _, _ in jobs
    }


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
