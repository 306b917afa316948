"""Where calibration text comes from: one source or several with their shares, as people write them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.calibration.written import SelfWritten
from secateurs.settings import parse_named

Calibration = str | Path | Tensor | Sequence[str | Path] | Mapping[str, float | None]
"""Token ids, a source of text, several, or several with their shares. `self` is the dense model."""

SELF = "self"

CLOSE = 0.01
"""How far shares may be from adding up to 1: thirds are written as 0.33."""


@dataclass(frozen=True)
class Source:
    """Where a share of the calibration sequences comes from."""

    text: str | Path
    """As `load_text` takes it, or `self`, perhaps with settings."""
    share: float
    """Above 0 and up to 1."""

    @property
    def writer(self) -> SelfWritten | None:
        """How the model is to write it; None if it is read. A file that is called self is `./self`."""
        if isinstance(self.text, Path) or self.text.partition(":")[0] != SELF:
            return None
        writer: SelfWritten = parse_named(self.text, {SELF: SelfWritten}, "source")
        return writer


def sources_of(calibration: str | Path | Sequence[str | Path] | Mapping[str, float | None]) -> list[Source]:
    """Where calibration sequences are to come from.

    Args:
        calibration: one source or several; each may have its share behind it ("a.txt=0.25", "self=25%"),
            unless that is the name of a file. Those without share what the others leave equally.

    Raises:
        ValueError: there is none, one is there twice, or the shares do not add up.
    """
    given: list[tuple[str | Path, Any]]
    if isinstance(calibration, Mapping):
        given = list(calibration.items())
    elif isinstance(calibration, str | Path):
        given = [_with_share(calibration)]
    else:
        given = [_with_share(source) for source in calibration]
    if not given:
        raise ValueError("calibration text is needed (a file, a folder, a dataset's name, or self)")
    names = [str(name) for name, _ in given]
    for name, (_, share) in zip(names, given, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"'{name}' is among the calibration texts twice: give it a larger share")
        if share is not None and not (isinstance(share, float | int) and 0 < share <= 1):
            raise ValueError(f"the share of '{name}' is above 0 and up to 1, not {share}")
    said = sum(share for _, share in given if share is not None)
    silent = sum(share is None for _, share in given)
    if said > 1 + CLOSE or (said < 1 - CLOSE and not silent) or (said > 1 - CLOSE and silent):
        rest = f", and {silent} more have none" if silent else ""
        raise ValueError(f"the shares of the calibration texts add up to {said:g}{rest}: make it 1")
    sources = [
        Source(name, (1 - said) / silent if share is None else share if silent else share / said)
        for name, share in given
    ]
    for source in sources:
        _ = source.writer  # its settings are read
    return sources


def _with_share(source: str | Path) -> tuple[str | Path, float | None]:
    if isinstance(source, Path) or Path(source).exists():
        return source, None
    name, _, share = source.rpartition("=")
    of_setting = name.startswith(f"{SELF}:") and "=" not in name.rpartition(",")[2]
    if not name or of_setting:
        return source, None
    try:
        return name, float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        return source, None


def counts_of(sources: Sequence[Source], samples: int) -> list[int]:
    """How many of the sequences each source gives: its share, and what rounding leaves to the largest rests.

    Raises:
        ValueError: one would give none.
    """
    exact = [source.share * samples for source in sources]
    counts = [math.floor(each + 1e-9) for each in exact]
    rests = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in rests[: samples - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise ValueError(f"of {samples} samples '{source.text}' would give none: ask for more samples")
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """Which part gives each sequence, where so many come from each part.

    Multiples of the square root of 2 modulo 1 are spread evenly, whether one takes the first few or, as
    descent does to judge itself, every eighth: either has all parts in it in about their proportions.
    """
    places = sorted(range(sum(counts)), key=lambda place: (place + 1) * math.sqrt(2) % 1)
    parts = chain.from_iterable(repeat(part, count) for part, count in enumerate(counts))
    return [part for _, part in sorted(zip(places, parts, strict=True))]
