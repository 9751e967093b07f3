"""The folder that a checkpoint of lutq's is written to: whether it may be, what it holds beside the weights, and its name."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lutq import __version__
from lutq.config import format_version
from lutq.errors import LutqError
from lutq.source import Source
from lutq.structure import Structure

TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "spiece.model")
OTHER_FILES = (
    "chat_template*",
    "additional_chat_templates",
    "sentencepiece*",
    "preprocessor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise LutqError unless `out` is free, or is an earlier output that may be overwritten."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not is_output(out)):
        raise LutqError(f"{out} exists and is not an output of lutq quantize: give another --out")
    if any(out.iterdir()) and not overwrite:
        raise LutqError(f"{out} already holds a quantized model: add --overwrite, or give another --out")


def is_output(out: Path) -> bool:
    """Whether a directory holds a checkpoint that lutq wrote."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "lutq"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_beside(folder: Path, source: Source, structure: Structure, card: str, dtype: str, quantization: dict[str, Any]) -> None:
    """Everything beside the weights: the source's tokenizer files, the model card, and config.json last.

    dtype: its name in config.json. quantization: what follows the heads of `quantization_config`, with `modules`.
    """
    for pattern in TOKENIZER_FILES + OTHER_FILES:
        for path in source.path.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
            else:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    (folder / "README.md").write_text(card, encoding="utf-8")
    heads = {"quant_method": "lutq", "format_version": format_version(quantization["modules"]), "lutq_version": __version__}
    config = source.raw_config | {"dtype": dtype, "quantization_config": heads | quantization}
    for key in ("torch_dtype", "compression_config"):
        config.pop(key, None)
    if any(structure.linears[name].place == "head" for name in quantization["modules"]):
        config["tie_word_embeddings"] = False  # the packed head no longer is the embedding
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def publish(partial: Path, out: Path) -> None:
    """Give the finished directory its name; an earlier output disappears only then."""
    if not out.exists():
        partial.replace(out)
        return
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as aside:
        earlier = Path(aside) / out.name
        out.replace(earlier)
        try:
            partial.replace(out)
        except OSError:
            earlier.replace(out)
            raise
