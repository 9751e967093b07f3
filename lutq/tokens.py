"""Tokenizers of checkpoint directories."""

from pathlib import Path
from typing import Any

from lutq.errors import LutqError


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a directory; code from the checkpoint is never run. Raises LutqError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LutqError(
            f"{path} has no usable tokenizer ({reason}): copy the tokenizer files of the original model there"
        ) from error
