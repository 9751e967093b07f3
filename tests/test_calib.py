"""Calibration text: which windows, from where, and what is refused in one sentence."""

import pytest
import torch

from lutq.calib import read_calibration, sample
from lutq.data import load_text
from lutq.errors import LutqError
from lutq.paths import ASSETS
from lutq.tokens import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "opt-tiny")


def test_windows_are_the_texts_own():
    tokens = torch.arange(1003)
    windows = sample(tokens, 4, 10, seed=0)
    assert windows.shape == (4, 10)
    for window in windows:
        assert window[0] % 10 == 0
        assert torch.equal(window, torch.arange(window[0], window[0] + 10))
    assert len(set(windows[:, 0].tolist())) == 4
    assert torch.equal(windows, sample(tokens, 4, 10, seed=0))
    assert not torch.equal(windows, sample(tokens, 4, 10, seed=1))
    everything = sample(tokens, 1000, 10, seed=0)
    assert torch.equal(everything[everything[:, 0].argsort()], tokens[:1000].view(100, 10)), "fewer than asked for: all"


def test_default_works_offline(tokenizer):
    calibration = read_calibration("books", tokenizer, 64, 1024, 0)
    assert calibration.windows.shape == (64, 1024)
    record = calibration.record()
    assert (record["windows"], record["length"]) == (64, 1024)
    assert len(record["sha256"]) == 64
    assert record != read_calibration("books", tokenizer, 64, 1024, 1).record()


def test_the_package_keeps_test_text_out(tokenizer):
    test, books = load_text("wikitext2", "raw").text, (ASSETS / "books.txt").read_text(encoding="utf-8")
    assert not {line for line in test.split("\n") if len(line) > 200} & set(books.split("\n"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "unknown calibration text"),
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"too short", "less than one window of 64"),
        (b"\xff\xfe caf\xe9", "is not UTF-8"),
        ((ASSETS / "wikitext2-raw-test.txt").read_bytes()[:20_000], "test split"),
    ],
    ids=["missing", "empty", "blank", "short", "latin-1", "test split"],
)
def test_bad_text_is_refused(tokenizer, tmp_path, content, words):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LutqError, match=words) as caught:
        read_calibration(str(file), tokenizer, 4, 64, 0)
    assert "\n" not in str(caught.value)
