"""Calibration text: which windows, from where, and what is refused in one sentence."""

import textwrap

import pytest
import torch

from lutq.calib import calibration_text, holds_test_text, read_calibration, sample
from lutq.data import load_text, wikitext_rows
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


def test_the_package_keeps_test_text_out():
    test, books = load_text("wikitext2", "raw").text.split(), calibration_text("books")[0]
    runs, words = {tuple(test[i : i + 12]) for i in range(len(test) - 11)}, books.split()
    assert not any(tuple(words[i : i + 12]) in runs for i in range(len(words) - 11))
    assert not holds_test_text(books)


FORMS = {
    "as it is": lambda text: text,
    "rows": lambda text: "\n\n".join(wikitext_rows(text)),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "stripped": lambda text: "\n".join(line.strip() for line in text.split("\n")),
    "wrapped": lambda text: "\n".join(textwrap.fill(line, 120) for line in text.split("\n")),
    "one line": lambda text: " ".join(text.split()),
}


@pytest.mark.parametrize("form", FORMS)
def test_test_text_is_refused_in_any_form(tmp_path, form):
    text = load_text("wikitext2", "raw").text[:20_000]
    file = tmp_path / "text.txt"
    file.write_bytes(FORMS[form](text).encode())
    with pytest.raises(LutqError, match="holds text of the WikiText-2 test split, which is for measuring"):
        calibration_text(str(file))


def test_a_few_lines_of_test_text_are_found_wherever_they_are():
    test, books = load_text("wikitext2", "raw").text.split(), calibration_text("books")[0].split()[:5000]
    for number in range(20):
        begin = 1000 * (number + 1)
        mixed = [*books[: 50 + number], *test[begin : begin + 39], *books[50 + number :]]
        assert holds_test_text(" ".join(mixed)), f"{number=}"
    assert not holds_test_text(" ".join(test[:19])), "too little to be told from other text"
    assert not holds_test_text("")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "unknown calibration text"),
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"too short", "less than one window of 64"),
        (b"\xff\xfe caf\xe9", "is not UTF-8"),
    ],
    ids=["missing", "empty", "blank", "short", "latin-1"],
)
def test_bad_text_is_refused(tokenizer, tmp_path, content, words):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LutqError, match=words) as caught:
        read_calibration(str(file), tokenizer, 4, 64, 0)
    assert "\n" not in str(caught.value)
