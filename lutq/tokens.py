"""Tokenizers of checkpoint directories."""

from pathlib import Path
from typing import Any

from lutq.errors import LutqError


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a directory; code from the checkpoint is never run. Raises LutqError."""
    from transformers import AutoTokenizer

    remedy = "copy the tokenizer files of the original model there"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise LutqError(f"{path} has no usable tokenizer ({reason}): {remedy}") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one without files
        raise LutqError(f"{path} has no tokenizer: {remedy}")
    return tokenizer
