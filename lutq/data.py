"""Evaluation texts by name. `wikitext2` is in the package; `c4` and `ptb` come through the `datasets` library; anything
else is the path of a text file.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lutq.errors import LutqError
from lutq.paths import ASSETS

C4_DOCUMENTS, C4_WINDOWS = 1100, 256  # as many validation documents, and windows of them, as the GPTQ code takes
NAMES = ("wikitext2", "c4", "ptb")


class Text(NamedTuple):
    """A text, where it came from in words, and how many windows of it are measured at most (None: all)."""

    text: str
    source: str
    windows: int | None = None


def load_text(name: str, protocol: str) -> Text:
    """The evaluation text of a dataset name or file path.

    protocol `raw` takes wikitext2 as the file is; every other protocol joins its rows with a blank line, as the GPTQ code
    does (arXiv 2210.17323). The other datasets and text files have one form only.
    Raises LutqError for an unknown name, an empty or non-UTF-8 file, or a dataset that cannot be fetched.
    """
    if name == "wikitext2":
        text = (ASSETS / "wikitext2-raw-test.txt").read_bytes().decode("utf-8")
        return Text(text if protocol == "raw" else "\n\n".join(wikitext_rows(text)), "WikiText-2 raw test, in the package")
    if name == "c4":
        files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        rows = fetch("allenai/c4", split="validation", data_files=files)
        return Text(" ".join(rows[:C4_DOCUMENTS]["text"]), f"allenai/c4 validation, first {C4_DOCUMENTS} documents", C4_WINDOWS)
    if name == "ptb":  # the dataset's own script is no longer run by `datasets`; the hub's parquet copy is
        files = {"test": "penn_treebank/test/0000.parquet"}
        rows = fetch("ptb-text-only/ptb_text_only", split="test", data_files=files, revision="refs/convert/parquet")
        return Text(" ".join(rows["sentence"]), "ptb-text-only/ptb_text_only test")
    if not Path(name).is_file():
        raise LutqError(f"unknown dataset {name!r}: use {', '.join(NAMES)} or the path of a text file")
    return Text(read_text(Path(name)), name)


def wikitext_rows(text: str) -> list[str]:
    """Rows as the Hugging Face dataset has them: each line with its newline, blank lines as empty strings."""
    return [line + "\n" if line.strip() else "" for line in text.split("\n")[:-1]]


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, unchanged. Raises LutqError with the remedy."""
    if not path.is_file():
        raise LutqError(f"there is no file {path}: give the path of a text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LutqError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    if not text.strip():
        raise LutqError(f"{path} is empty: give a file with some text")
    return text


def fetch(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`, its failures turned into one sentence."""
    try:
        import datasets
    except ImportError as error:
        raise LutqError(f"{path} needs the datasets package: pip install datasets") from error
    try:
        return datasets.load_dataset(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LutqError(f"could not fetch {path} ({reason}): check the network, or give a text file") from error
