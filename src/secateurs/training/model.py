"""What a model's configuration says before its weights are loaded."""

from transformers import PretrainedConfig

from secateurs.anatomy import anatomy_of
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config as read_causal_config


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a decoder.

    Raises:
        ValueError: transformers cannot read it, or its blocks cannot be made out.
    """
    config = read_causal_config(checkpoint)
    anatomy_of(config)
    return config


def sequence_length(length: int | None, config: PretrainedConfig) -> int:
    """Tokens in a sequence: those asked for, or as many as the model was made for and at most 2048.

    Raises:
        ValueError: the model has fewer positions, or there is no next token to learn.
    """
    positions: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is None:
        return min(positions or 2048, 2048)
    if length < 2 or (positions and length > positions):
        raise ValueError(
            f"sequences of {length} tokens: from 2 to {positions or 'any number'} suit this model"
        )
    return length
