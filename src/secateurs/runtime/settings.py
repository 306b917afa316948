"""What the verbs that run models, and make them ready to run, can be told."""

from dataclasses import dataclass
from pathlib import Path

from secateurs.device import resolve_device
from secateurs.settings import OnDevice


@dataclass(frozen=True)
class CompressSettings:
    """Write a pruned model so that its zeros take no space: smaller, and faster to run.

    `import secateurs` is all that transformers needs to load the folder.

    Example: secateurs compress my-llama-70 --output my-llama-70-small
    """

    output: str | Path
    """The folder to make. It must not exist."""


@dataclass(frozen=True)
class DecompressSettings:
    """Turn a compressed model into an ordinary dense one.

    Example: secateurs decompress my-llama-70-small --output my-llama-70
    """

    output: str | Path
    """The folder to make. It must not exist."""


@dataclass(frozen=True)
class GenerateSettings(OnDevice):
    """Continue a prompt with a model, dense or compressed, one likeliest token after another.

    Example: secateurs generate my-llama-70-small --prompt "It was a dark night" --stats
    """

    prompt: str
    """What to continue."""

    tokens: int = 100
    """At most so many new ones; fewer if the model ends its text."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if self.tokens < 1:
            raise ValueError("there is nothing to generate: no tokens are asked for")
        resolve_device(self.device)


@dataclass(frozen=True, kw_only=True)
class ChatSettings(OnDevice):
    """Talk with a model, dense or compressed, in the terminal; or line by line, through pipes.

    Tokens are drawn as the model's generation_config.json says, or the likeliest.

    Example: secateurs chat my-llama-70-small --system "Be brief."
    """

    system: str | None = None
    """A system prompt, for models whose chat template has a place for one."""

    tokens: int = 512
    """At most so many new ones in an answer."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if self.tokens < 1:
            raise ValueError(f"tokens are at least 1, not {self.tokens}")
        resolve_device(self.device)


@dataclass(frozen=True, kw_only=True)
class ServeSettings(OnDevice):
    """Serve a model, dense or compressed, with transformers' OpenAI-compatible server.

    Example: secateurs serve my-llama-70-small --port 8080
    """

    host: str = "localhost"
    """Address to listen on."""

    port: int = 8000
    """To listen on."""

    def __post_init__(self) -> None:
        """Raises ValueError for what does not suit."""
        if not 0 < self.port < 65536:
            raise ValueError(f"a port is a number from 1 to 65535, not {self.port}")
        resolve_device(self.device)
