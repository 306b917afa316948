"""Shared libraries that may be missing or broken."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from secateurs import native


@pytest.fixture(autouse=True)
def _forget() -> None:
    native.library.cache_clear()


def test_one_that_was_not_built() -> None:
    assert native.library("pruning._nothing") is None
    assert native.function("pruning._nothing", "secateurs_nothing", []) is None


def test_one_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "find_spec", lambda name: SimpleNamespace(origin=str(broken)))
    with pytest.warns(UserWarning, match="does without 'pruning._broken', which cannot be loaded"):
        assert native.function("pruning._broken", "secateurs_broken", []) is None
