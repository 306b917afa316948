"""An OpenAI-compatible server for dense and compressed models: transformers' own."""

from pathlib import Path

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.device import resolve_device


def serve(model: str | Path, *, host: str = "localhost", port: int = 8000, device: str | None = None) -> None:
    """Serves a model over HTTP until interrupted: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed.
        host: address to listen on.
        port: to listen on.
        device: "cpu", "cuda", "cuda:1"...; by default a GPU where there is one.

    Raises:
        ValueError: the model is broken, or transformers' serving extra is not installed.
    """
    folder = Checkpoint(resolve(model)).folder
    try:
        from transformers.cli.serve import Serve

        Serve(force_model=str(folder), host=host, port=port, device=str(resolve_device(device)))
    except ImportError as error:
        raise ValueError(f"serving needs `pip install 'transformers[serving]'` ({error})") from None
