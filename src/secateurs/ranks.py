"""Processes that work on one model together: what each does, and what they add up.

torchrun or accelerate starts them, each a rank. All hold the same block; each pushes its own share of the
sequences through it, and sums over tokens are sums over ranks. What is solved by such sums alone is shared
out, and its results told to all. The main rank writes.

Without other ranks nothing here does anything, and so it is where one rank works by itself (`alone`).
"""

import atexit
import io
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")

MEETING = timedelta(minutes=5)
"""For all to have come."""

TIMEOUT = timedelta(days=30)
"""For a rank to wait for others that neither go on nor end, as long as what they do may take: of those that
end, it hears at once."""

FAREWELL = 5.0
"""Seconds for a rank that ends to wait for the others to."""

TOLD = (ValueError, FloatingPointError, OSError)
"""Errors of one rank that all then raise; others end it, and with it the run."""


class _Place(NamedTuple):
    rank: int = 0
    world: int = 1


_here = _Place()


def world() -> int:
    """How many ranks work together."""
    return _here.world


def is_main() -> bool:
    """Whether this is the rank that writes, shows progress, and does what is not shared."""
    return _here.rank == 0


@contextmanager
def together() -> Iterator[None]:
    """Work with the other processes that were started with this one, if there are any.

    They stay connected until they end: launchers let them meet once.

    Raises:
        ConnectionError: they cannot be reached.
        ValueError: there are GPUs, and the launcher does not say which is this one's.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    count = int(os.environ["WORLD_SIZE"]) if launched else 1
    if count == 1 or _here.world > 1:
        yield
        return
    if not distributed.is_initialized():
        backend = _backend()
        try:
            store, rank, _ = next(distributed.rendezvous("env://", timeout=MEETING))
        except RuntimeError as error:
            raise ConnectionError(
                f"WORLD_SIZE is {count}, but not all of so many processes have come within {MEETING}: start "
                "them all, or unset it to work with one"
            ) from error
        with _linked():
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        atexit.register(disconnect)
    with _placed(_Place(distributed.get_rank(), distributed.get_world_size())):
        yield


def disconnect() -> None:
    """Let go of the others; those that still wait for this one hear of it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _backend() -> str:
    """NCCL where each process has a GPU of its own, which is then the one that `cuda` means; or gloo."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return "gloo"
    try:
        local, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except KeyError as error:
        raise ValueError(
            f"several processes share GPUs by {error}: start them by torchrun, or set it"
        ) from None
    torch.cuda.set_device(local % gpus)
    return "cpu:gloo,cuda:nccl" if here <= gpus else "gloo"


@contextmanager
def _placed(place: _Place) -> Iterator[None]:
    global _here
    before, _here = _here, place
    try:
        yield
    finally:
        _here = before


@contextmanager
def alone() -> Iterator[None]:
    """Work as one process does: nothing inside waits for other ranks."""
    with _placed(_Place()):
        yield


@contextmanager
def _linked() -> Iterator[None]:
    """Turns what torch says of lost connections into a ConnectionError, which cites what may be another's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # Of gloo's some are plain ones, as are those of other mistakes.
        said = "" if isinstance(error, distributed.DistError) else f" ({str(error).partition(chr(10))[0]})"
        raise ConnectionError(
            "another of the ranks has ended or cannot be reached: what is done stays, and the same command "
            f"continues{said}"
        ) from error


def say_last(line: str) -> None:
    """Say on standard error why this process ends, unless another rank has said why the run does.

    Then wait for a moment for all to come to their own ends: launchers stop those that have not.
    """
    if _here.world == 1:
        print(line, file=sys.stderr)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ended, until = 0, time.monotonic() + FAREWELL
    with suppress(RuntimeError):  # the store was in the process that has ended
        store = distributed.distributed_c10d._get_default_store()
        ended = store.add("secateurs/ended", 1)
        if ended > 1:
            line = ""
    if line:
        print(line, file=sys.stderr, flush=True)
    with suppress(RuntimeError):
        while 0 < ended < _here.world and time.monotonic() < until:
            time.sleep(0.05)
            ended = store.add("secateurs/ended", 0)


def check_share(sequences: int) -> None:
    """Raises ValueError if there are fewer sequences than ranks."""
    if sequences < _here.world:
        raise ValueError(
            f"{_here.world} ranks cannot share {sequences} sequences: give more, or start fewer ranks"
        )


def share_of(tokens: Tensor) -> Tensor:
    """This rank's sequences of (samples, length), at least one: see `check_share`."""
    return tokens.tensor_split(_here.world)[_here.rank]


def part_of(count: int) -> int:
    """This rank's part of so many of anything, of which ranks take one after the other."""
    return count // _here.world + (_here.rank < count % _here.world)


def summed(tensor: Tensor) -> Tensor:
    """Add to a tensor, in place, those of the other ranks: in an order that depends on their number alone."""
    if _here.world > 1:
        with _linked():
            distributed.all_reduce(tensor)
    return tensor


def total(value: float) -> float:
    """The sum of all ranks' values."""
    return value if _here.world == 1 else float(summed(torch.tensor(value, dtype=torch.float64)))


def meet() -> None:
    """Wait until all ranks have come here."""
    total(0)


def averaged(tensors: Sequence[Tensor], weight: int) -> Sequence[Tensor]:
    """The mean of all ranks' tensors, vectors of the same lengths.

    Args:
        tensors: this rank's.
        weight: what these count.
    """
    if _here.world == 1:
        return tensors
    own = torch.cat([*tensors, tensors[0].new_ones(1)])
    sums = summed(own.mul_(weight))
    return sums[:-1].div_(sums[-1]).split([len(tensor) for tensor in tensors])


class Poolable(Protocol):
    """What was summed over some tokens."""

    def pool(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Take what others have seen into account as well; `summed` adds theirs to a tensor, in place."""
        ...


def pool(*sums: Poolable) -> None:
    """Let each be of all ranks' tokens."""
    if _here.world > 1:
        for each in sums:
            each.pool(summed)


def from_main(work: Callable[[], T]) -> T:
    """What the main rank finds by itself, while the others wait; its errors are raised by all."""
    if _here.world == 1:
        return work()
    found: T = _told(_attempted(work) if is_main() else None, 0, torch.device("cpu"))
    return found


class Task(NamedTuple):
    """Something that one rank can do for all, or several of them by parts."""

    cost: float
    """In any unit; what costs nothing, each rank does by itself."""
    do: Callable[[Tensor | None], Any]
    """Is given which of its rows are to be done, their numbers, or None for all."""
    rows: int = 1
    """Each of which could be done by itself."""


LEAST_ROWS = 128
"""Of a part. What the rows of a matrix compete for, those of a part compete for among themselves, and so few
stand for all well enough."""

BALANCED = 1.15
"""What the busiest rank may have to do, over the mean, before tasks are divided: a part is dearer than its
share of rows."""


def shared_out(tasks: deque[Task], device: torch.device) -> Iterator[list[Any]]:
    """What comes of each of some tasks, in their order: of all of it, or of each part.

    A task is done by one rank. Where some would have to wait for others, all that have rows enough are
    divided (`rows_of_parts`).

    Args:
        tasks: none of which needs what comes of another. It is emptied.
        device: where tensors in the results are wanted.

    Raises:
        ValueError, FloatingPointError, OSError: a task did; on all ranks.
    """
    if _here.world == 1:
        while tasks:
            yield [tasks.popleft().do(None)]  # and what only it needed is let go of before the next
        return
    counts = parts_of([(task.cost, task.rows) for task in tasks], _here.world)
    costs = [task.cost / count for task, count in zip(tasks, counts, strict=True) for _ in range(count)]
    owners = iter(owners_of(costs, _here.world))
    found = deque[list[tuple[int | None, _Found | None]]]()
    for count in counts:
        task = tasks.popleft()
        parts = [None] if count == 1 else rows_of_parts(task.rows, count)
        found.append([(owner, _own(task, part, owner)) for part, owner in zip(parts, owners, strict=False)])
    while found:
        yield [_value(own) if owner is None else _told(own, owner, device) for owner, own in found.popleft()]


def _own(task: Task, rows: Tensor | None, owner: int | None) -> "_Found | None":
    """What comes of a part of a task, if this rank is to do it."""
    return _attempted(partial(task.do, rows)) if owner in (None, _here.rank) else None


def rows_of_parts(rows: int, count: int) -> list[Tensor]:
    """The numbers of the rows that each of some parts has: one of every so many, whichever chance gives it.

    At regular distances a part could have rows of the same place in every head, which are alike.
    """
    groups = -(-rows // count)
    places = torch.rand(groups, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    numbers = places + count * torch.arange(groups)[:, None]
    return [own[own < rows] for own in numbers.T]


def parts_of(tasks: Sequence[tuple[float, int]], world: int) -> list[int]:
    """Into how many parts so many ranks divide each of some tasks, of which there are cost and rows."""
    costs = [cost for cost, _ in tasks]
    loads = [0.0] * world
    for cost, owner in zip(costs, owners_of(costs, world), strict=True):
        if owner is not None:
            loads[owner] += cost
    if max(loads) <= BALANCED * sum(loads) / world:
        return [1] * len(tasks)
    return [max(1, min(world, rows // LEAST_ROWS)) if cost else 1 for cost, rows in tasks]


def owners_of(costs: Sequence[float], world: int) -> list[int | None]:
    """Which of so many ranks does each: the most costly first, and always by who has least to do. None for
    all."""
    loads, owners = [0.0] * world, list[int | None]([None] * len(costs))
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        if costs[task] == 0:
            break
        owner = owners[task] = loads.index(min(loads))
        loads[owner] += costs[task]
    return owners


class _Found(NamedTuple):
    value: Any
    error: Exception | None = None


def _attempted(work: Callable[[], Any]) -> _Found:
    """What comes of it, or the error: as one of those told, which others can make from its line."""
    with alone():
        try:
            return _Found(work())
        except TOLD as error:
            kind = next(kind for kind in TOLD if isinstance(error, kind))
            return _Found(None, kind(str(error)).with_traceback(error.__traceback__))


def _value(found: _Found | None) -> Any:
    assert found is not None
    if found.error is not None:
        raise found.error
    return found.value


def _told(found: _Found | None, owner: int, device: torch.device) -> Any:
    """What one rank has found, on all."""
    packed: list[bytes | None] = [None]
    if found is not None:
        buffer = io.BytesIO()
        torch.save(found, buffer)
        packed = [buffer.getvalue()]
    with _linked():
        distributed.broadcast_object_list(packed, owner)
    if found is None:
        assert packed[0] is not None
        # Never from a file: another rank of this run has just made it, and it holds more than tensors.
        found = torch.load(io.BytesIO(packed[0]), map_location=device, weights_only=False)
    return _value(found)
