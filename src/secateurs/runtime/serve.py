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
    try:
        from fastapi.routing import APIRoute
        from transformers.cli.serve import Serve

        class Prepared(Serve):
            """Does not answer before it is told to."""

            def start_server(self) -> None:
                pass

        prepared = Prepared(
            force_model=str(folder),
            attn_implementation=attention,
            host=settings.host,
            port=settings.port,
            device=str(where),
            non_blocking=True,
        )
    except ImportError as error:
        raise ValueError(f"serving needs `pip install 'secateurs[serve]'` ({error})") from None
    entry = {"id": str(folder), "object": "model", "created": int(time.time()), "owned_by": "secateurs"}
    models = APIRoute("/v1/models", lambda: {"object": "list", "data": [entry]}, methods=["GET", "OPTIONS"])
    # In front of transformers' own, which lists the hub's cache, or fails where there is none.
    app: Any = prepared.server.config.app
    app.router.routes.insert(0, models)
    prepared.server.run()
