"""What lies beside the weights and travels with them: configs, tokenizer, licences, cards, code, pictures.

Not a list of what to keep, for people keep all kinds of things, but one of what to leave: other weights, what
describes weights that are not written, and what a training run left behind.
"""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from secateurs.checkpoint.writing import copy_file

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.distcp")
"""Weights that only unpickling opens."""

FOREIGN = (
    *("*.h5", "*.keras", "*.msgpack", "*.ot", "*.npz", "*.npy", "*.pdparams", "*.nemo", "*.engine"),
    *("*.onnx*", "*.gguf", "*.ggml", "*.llamafile", "*.tflite", "*.mlmodel", "*.mlpackage"),
)
"""Weights for other programs."""

ADAPTERS = ("adapter_config.json", "adapter_model.*")

LEFT = (
    *("*.safetensors", "*.index.json", *PICKLED, *FOREIGN, *ADAPTERS),
    # A training run's, or an earlier run's of this library.
    *("trainer_state.json", "training_args.*", "events.out.tfevents.*", "zero_to_fp32.py", "latest"),
    "secateurs.json",
)
"""Names of files, in any case, that stay behind."""


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a file's name is one of those, in any case."""
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that go with other weights of the same shapes.

    Left out are weights of every format and what indexes or adapts them, what training left, what is hidden,
    an earlier run's record and its `plots`, and every sub-folder that holds weights (`original`, `onnx`,
    `checkpoint-500`). Links are followed.

    Returns:
        Paths within the folder, sorted.
    """
    found = _companions(folder, {folder.resolve()})
    if (folder / "secateurs.json").is_file():
        found = [path for path in found if path.relative_to(folder).parts[0] != "plots"]
    return sorted(path.relative_to(folder) for path in found)


def _companions(folder: Path, above: set[Path]) -> list[Path]:
    found = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            if not matches(path.name, LEFT):
                found.append(path)
        elif path.is_dir() and path.resolve() not in above and not _holds_weights(path):
            found += _companions(path, above | {path.resolve()})  # not a link to where we came from
    return found


def _holds_weights(folder: Path) -> bool:
    weights = ("*.safetensors", *PICKLED, *FOREIGN)
    return any(matches(path.name, weights) for path in folder.iterdir())


def bytes_of_companions(folder: Path) -> int:
    """Size of all of them together."""
    return sum((folder / path).stat().st_size for path in companions(folder))


def copy_companions(folder: Path, target: Path, replaced: Collection[str]) -> None:
    """Copy them, byte for byte, sub-folders too.

    Args:
        folder: the model that they are of.
        target: an existing folder.
        replaced: their paths within the folder that the caller writes himself (`config.json`, `README.md`).
    """
    for path in companions(folder):
        if path.as_posix() not in replaced:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(folder / path, target / path)
