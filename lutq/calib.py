"""Calibration text: windows of tokens that the calibrated stages of `lutq quantize` see. Never from a test split.

`books` is in the package; `own` is what the model writes itself (lutq/samples.py); `wikitext2`, `c4` and `ptb` are the *training*
splits, fetched with the `datasets` library; anything else is the path of a text file. The windows are a seeded choice of the
text's own, without overlap, and a checkpoint records their hash.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lutq.config import QuantConfig
from lutq.data import fetch, read_text
from lutq.errors import LutqError
from lutq.journal import Journal
from lutq.paths import ASSETS
from lutq.samples import write_windows
from lutq.store import FOLDER, Store

NAMES = ("books", "own", "wikitext2", "c4", "ptb")
OWN = "own"  # no text yet: the model writes it
LONGEST = 2048  # tokens of a window by default, or the model's maximum if that is less
CHARACTERS = 30_000_000  # of a fetched text that are read at most
TELLTALE = 20  # words in a row that tell a text from any other; 14 are shared by articles of WikiText-2 on like things


class Calibration(NamedTuple):
    """Windows int64 [windows, length] of a text; source says in words where they are from."""

    windows: torch.Tensor
    source: str

    def describe(self) -> str:
        """In words."""
        count, length = self.windows.shape
        return f"{count} windows of {length} tokens: {self.source}"

    def record(self) -> dict[str, Any]:
        """What a checkpoint says about them."""
        tokens = self.windows.contiguous().numpy().astype("<i8").tobytes()
        shape = dict(zip(("windows", "length"), self.windows.shape, strict=True))
        return {"source": self.source, **shape, "sha256": hashlib.sha256(tokens).hexdigest()}


def calibration_text(name: str) -> tuple[str, str]:
    """The text of a name or file, and where it is from. Raises LutqError for what is no text, or is a test split."""
    if name == "books":
        return read_text(ASSETS / "books.txt"), "public-domain English books, in the package"
    if name == "wikitext2":
        rows = fetch("Salesforce/wikitext", name="wikitext-2-raw-v1", split="train")["text"]
        return "\n\n".join(rows)[:CHARACTERS], "WikiText-2 raw train"
    if name == "c4":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        rows = fetch("allenai/c4", split="train", data_files=files)[:20_000]["text"]
        return " ".join(rows)[:CHARACTERS], "allenai/c4 train, first documents"
    if name == "ptb":
        files = {"train": "penn_treebank/train/0000.parquet"}
        rows = fetch("ptb-text-only/ptb_text_only", split="train", data_files=files, revision="refs/convert/parquet")
        return " ".join(rows["sentence"]), "ptb-text-only/ptb_text_only train"
    if not Path(name).is_file():
        raise LutqError(f"unknown calibration text {name!r}: use {', '.join(NAMES)} or the path of a text file")
    text = read_text(Path(name))
    if holds_test_text(text):
        raise LutqError(f"{name} holds text of the WikiText-2 test split, which is for measuring: calibrate with another text")
    return text, Path(name).name


def holds_test_text(text: str) -> bool:
    """Whether a text shares words in a row with the embedded test split, however its lines are broken or ended.

    One run in every TELLTALE words of the text is looked for, so 2 * TELLTALE - 1 shared words are found wherever they are.
    """
    test = read_text(ASSETS / "wikitext2-raw-test.txt").split()
    words = text.split()
    runs = {" ".join(words[i : i + TELLTALE]) for i in range(0, len(words), TELLTALE)}
    return any(" ".join(test[i : i + TELLTALE]) in runs for i in range(len(test) - TELLTALE + 1))


def sample(tokens: torch.Tensor, windows: int, length: int, seed: int, name: str = "the text") -> torch.Tensor:
    """`windows` of the windows of `length` that tokens int64 [T] divide into, chosen by `seed`; all of them where there are
    fewer. Raises LutqError when there is not even one.
    """
    count = len(tokens) // length
    if count == 0:
        raise LutqError(f"{name} has {len(tokens)} tokens, less than one window of {length}: give a longer calibration text")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:windows]
    return tokens[: count * length].view(count, length)[chosen]


def read_calibration(name: str, tokenizer: Any, windows: int, length: int, seed: int) -> Calibration:
    """Windows of a calibration text in the tokens of a model. Raises LutqError."""
    text, source = calibration_text(name)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    return Calibration(sample(tokens, windows, length, seed, source), source)


def calibration_for(path: Path, model_config: Any, config: QuantConfig) -> Calibration | None:
    """The calibration windows of a run, in the tokens of the model in `path`; None where it is to write them itself, see
    `own_calibration`. Raises LutqError.
    """
    from lutq.tokens import load_tokenizer

    length = window_length(model_config, config)
    if config.calib == OWN:
        return None
    return read_calibration(config.calib, load_tokenizer(path), config.calib_windows, length, config.seed)


def own_calibration(
    path: Path, model_config: Any, config: QuantConfig, device: torch.device, partial: Path, journal: Journal
) -> Calibration:
    """The windows that the model in `path` writes on `device`; an interrupted run goes on with the same. Raises LutqError."""
    from lutq.tokens import load_tokenizer

    store = Store(partial / FOLDER, journal)
    windows = store.load(OWN)
    if windows is None:
        length = window_length(model_config, config)
        windows = write_windows(path, load_tokenizer(path), config.calib_windows, length, config.seed, device)
        store.save(OWN, windows)
    return Calibration(windows, "written by the model itself")


def window_length(model_config: Any, config: QuantConfig) -> int:
    """Tokens of a calibration window. Raises LutqError for more than the model takes."""
    longest = getattr(model_config, "max_position_embeddings", None) or LONGEST
    if config.calib_length > longest:
        raise LutqError(f"calib_length is {config.calib_length} and the model takes {longest} tokens at most: use {longest}")
    return config.calib_length or min(LONGEST, longest)
