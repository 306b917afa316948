"""The folder that a run is to make: what would stop it, found before the work."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateurs.checkpoint.companions import bytes_of_companions
from secateurs.checkpoint.reading import Checkpoint

MARGIN_BYTES = 16 * 2**20
"""For records, cards and indices."""

RECORD = "secateurs.json"
"""The file in a model folder that says how it came to be."""

MARK = "secateurs-unfinished"
"""The file in `OUTPUT.partial` that says that what lies there may be deleted."""


def is_free(place: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def partial_of(output: Path) -> Path:
    """The folder in which an output, without links in its path, is made."""
    return output.with_name(output.name + ".partial")


def run_of(identity: dict[str, Any]) -> str:
    """What stands for a run in marks and records, by all that decides what it makes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def taken(output: Path) -> ValueError:
    """An output folder is not the run's that would make it."""
    return ValueError(f"'{output}' exists and is not this run's: give another output folder")


def unfinished(partial: Path, others: str) -> ValueError:
    """A folder that outputs are made in holds another run, one with other settings, say."""
    return ValueError(
        f"'{partial}' holds an unfinished run with other {others}: delete it or give another output folder"
    )


def check_place(output: Path, checkpoint: Checkpoint) -> None:
    """Find what speaks against a place for an output folder, whatever is there. Leaves nothing behind.

    Args:
        output: the folder that is to be made.
        checkpoint: the model that is read.

    Raises:
        ValueError: it is or lies in the model's folder, is a mount point, or cannot be made.
    """
    place, source = output.resolve(), checkpoint.folder.resolve()
    if place == source:
        raise ValueError(f"'{output}' is the model's own folder: give another output folder")
    if source in place.parents:
        raise ValueError(f"'{output}' lies in the model's own folder: give another output folder")
    if place.is_mount():
        raise ValueError(
            f"'{output}' is a mount point, which cannot be made in one step: give a folder in it"
        )
    parent = _parent(place)
    # Only trying tells: /proc can be written by root as far as its mode says, and names may be too long.
    probe = parent / (place.relative_to(parent).parts[0] + ".partial")
    try:
        probe.mkdir()
        probe.rmdir()
    except FileExistsError:  # so it can be made: an earlier run, or one that is at the same point now, did
        pass
    except OSError as error:
        if error.errno == errno.ENOSPC:  # not the name's fault
            raise
        raise ValueError(
            f"'{output}' cannot be made in '{parent}' ({error.strerror}): give another output folder"
        ) from None


def check_output(output: Path, checkpoint: Checkpoint, needed_bytes: int) -> None:
    """Find what would stop a run from making its output folder. Leaves nothing behind.

    Args:
        output: must not exist, or be an empty folder.
        checkpoint: the model that is read, whose companions are copied too.
        needed_bytes: of the weights that are still to be written.

    Raises:
        ValueError: the output exists; or see `check_place`.
        OSError: the disk has too little space.
    """
    check_place(output, checkpoint)
    place = output.resolve()
    if not is_free(place):
        raise ValueError(f"'{output}' exists already: give another output folder")
    check_space(
        place, needed_bytes + bytes_of_companions(checkpoint.folder) + MARGIN_BYTES, what="the output"
    )


def check_space(place: Path, needed_bytes: int, what: str) -> None:
    """Raises OSError, which says what it is for, if the disk of a place has too little space."""
    parent = _parent(place)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OSError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB, the disk of '{parent}' has {free / 1e9:.2f} GB free"
        )


def _parent(place: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in place.parents if os.path.lexists(folder))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` by one rename when the block ends well, and else is deleted.

    It is in `OUTPUT.partial`, beside a mark. What a killed run left there is deleted, if it bears the mark.

    Raises:
        ValueError: `OUTPUT.partial` holds something else.
    """
    output = output.resolve()
    partial = partial_of(output)
    mark, folder = partial / MARK, partial / "model"
    if not mark.is_file() and not is_free(partial):
        raise ValueError(f"'{partial}' holds another unfinished run: delete it or give another output folder")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        mark.touch()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        os.replace(folder, output)
    finally:
        # The mark last of all: until then what is left is known for ours.
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
