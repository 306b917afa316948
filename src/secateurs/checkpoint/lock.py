"""One run at a time writes an output folder."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold `OUTPUT.lock`, which the system lets go of when the process ends, however it ends.

    The file is removed afterwards, and folders that were made for it and stay empty. Where it stays it is
    harmless: the lock is on it, not in it.

    Raises:
        ValueError: another run holds it, or it cannot be made.
    """
    output = output.resolve()
    file = output.with_name(output.name + ".lock")
    lock = FileLock(file)
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is writing '{output}': wait for it or give another output folder"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:  # not the name's fault
            raise
        raise ValueError(
            f"'{output}' cannot be made ({error.strerror or error}): give another output folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: after that it may be another run's
            file.unlink()
        lock.release()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
