"""An OpenAI-compatible server for dense and compressed models: transformers' own."""

import time
from pathlib import Path
from typing import Any

from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint.names import skeleton_of
from secateurs.device import resolve_device
from secateurs.runtime.settings import ServeSettings
from secateurs.settings import takes


@takes(ServeSettings)
def serve(model: str | Path, *, settings: ServeSettings) -> None:
    """Serves a model over HTTP until interrupted: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

    Args:
        model: a model folder or a name on the Hugging Face hub, dense or compressed. Clients call it by its
            folder, as `/v1/models` tells them.

    Raises:
        ValueError: the model is broken, or transformers' serving extra is not installed.
    """
    checkpoint, where = Checkpoint(resolve(model)), resolve_device(settings.device)
    folder = checkpoint.folder
    # Not config.json's, which need not be installed: the one that transformers chose for the skeleton.
    attention: str = skeleton_of(checkpoint).config._attn_implementation
    if checkpoint.renamed:
        raise ValueError(
            f"tensors in '{folder}' bear names that a wrapper changed: save the model by its own names first"
        )
    entry = {"id": str(folder), "object": "model", "created": int(time.time()), "owned_by": "secateurs"}
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving.model_manager import ModelManager

        # `/v1/models` would list the hub's cache, or fail where there is none, but never this model.
        manager: Any = ModelManager
        manager.get_gen_models = staticmethod(lambda cache_dir=None: [entry])
        Serve(
            force_model=str(folder),
            attn_implementation=attention,
            host=settings.host,
            port=settings.port,
            device=str(where),
        )
    except ImportError as error:
        raise ValueError(f"serving needs `pip install 'secateurs[serve]'` ({error})") from None
