"""Where a model is: a folder here, a .gguf file, or a name on the Hugging Face hub."""

from pathlib import Path

from secateurs.checkpoint.companions import ADAPTERS, FOREIGN, PICKLED
from secateurs.checkpoint.gguf import gguf_file, unpacked_folder
from secateurs.values import SCALES

# All but weights that are never read: of other formats, Mistral's second copy, and those in sub-folders.
IGNORED = [*PICKLED, *FOREIGN, *ADAPTERS, "consolidated*.safetensors", "*/*.safetensors", "original/*"]


def resolve(model: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model given as a folder, a .gguf file or a name on the Hugging Face hub.

    A .gguf file, also one that is all the weights of a folder, is unpacked at first (`unpacked_folder`).

    Args:
        model: as people give it.
        weights: whether they are to be fetched from the hub, or config.json alone.

    Raises:
        ValueError: neither a folder here, nor a .gguf file that can be read, nor a model that the hub gives.
        OSError: there is no place for what is unpacked.
    """
    folder = Path(model)
    file = gguf_file(folder)
    if file is not None:
        return unpacked_folder(file)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"'{model}' is a file: give the model folder that holds it, or a .gguf file")
    if folder.suffix == ".gguf":
        raise ValueError(f"no file at '{model}'")
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"no model folder at '{model}'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not weights:
            return Path(snapshot_download(str(model), allow_patterns=["config.json"]))
        snapshot_download(str(model), ignore_patterns=IGNORED)
        # The one sub-folder whose weights are read. Of what is not there nothing comes.
        return Path(snapshot_download(str(model), allow_patterns=[SCALES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"'{model}' is not a folder here and could not be fetched from the Hugging Face hub ({reason}); "
            "pass the path of a model folder"
        ) from None
