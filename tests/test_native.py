"""Shared libraries that may be missing or broken."""

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateurs import native


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_library_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_broken.so"
    broken.write_bytes(b"no library")
    for found, reason in ((None, "no C\\+\\+ compiler"), (SimpleNamespace(origin=str(broken)), "too short")):
        native.library.cache_clear()
        monkeypatch.setattr(native, "find_spec", lambda name, found=found: found)
        with pytest.warns(UserWarning, match=f"all is slower .*{reason}"):
            assert native.library("pruning.solvers._sweep", "all is slower") is None
        with warnings.catch_warnings(action="error"):
            assert (
                native.function("pruning.solvers._sweep", "secateurs_sweep", [], without="all is slower")
                is None
            )


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    "driver", sorted((Path(__file__).parents[1] / "tools").glob("*.cpp")), ids=lambda it: it.stem
)
def test_what_drives_the_kernels_under_sanitizers_compiles(driver: Path) -> None:
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", "-w", "-fopenmp", driver], check=True)
