"""Text in (files, folders, data sets by name), blocks of tokens out."""

from secateurs.text.sources import Split, Text, load_text
from secateurs.text.tokens import calibration_blocks, evaluation_tokens, load_tokenizer

__all__ = ["Split", "Text", "calibration_blocks", "evaluation_tokens", "load_text", "load_tokenizer"]
