"""Text in (files, folders, data sets by name), blocks of tokens out."""

from secateurs.text.conversations import Conversation
from secateurs.text.documents import Text
from secateurs.text.folders import Split
from secateurs.text.sources import load_conversations, load_text
from secateurs.text.tokens import (
    TooShortError,
    bos_id,
    calibration_blocks,
    check_tokens,
    evaluation_tokens,
    load_tokenizer,
    wants_bos,
)

__all__ = [
    "Conversation",
    "Split",
    "Text",
    "TooShortError",
    "bos_id",
    "calibration_blocks",
    "check_tokens",
    "evaluation_tokens",
    "load_conversations",
    "load_text",
    "load_tokenizer",
    "wants_bos",
]
