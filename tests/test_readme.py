"""The README says what the repository does: its tables, recipe, file names and flags are checked against it."""

import re
import sys
from pathlib import Path

import pytest

from lutq.config import FIELDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import perplexity_report

    body = README.split(perplexity_report.BEGIN)[1].split(perplexity_report.END)[0]
    assert body.strip() == perplexity_report.tables().strip()
    assert len(perplexity_report.read_results()) == 2
    del sys.modules["perplexity_report"]


def test_kernel_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import kernel_report

    body = README.split(kernel_report.BEGIN)[1].split(kernel_report.END)[0]
    assert body.strip() == kernel_report.tables().strip()
    assert len(kernel_report.read_results()) == 1
    del sys.modules["kernel_report"]


def test_recipe_is_the_shipped_one():
    assert (ROOT / "configs" / "mixed-3bit.toml").read_text(encoding="utf-8").strip() in README


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:scripts|configs|lutq|tests)/[\w./-]+\.(?:sh|py|toml|md|png)", README)))
)
def test_named_files_exist(path):
    assert (ROOT / path).is_file(), path


def test_every_module_is_in_the_file_tree():
    tree = README.split("## Files")[1].split("## Limits")[0]
    for module in (ROOT / "lutq").glob("*.py"):
        if not module.stem.startswith("__"):
            assert re.search(rf"\b{module.stem}\b", tree), module.stem


def test_named_flags_exist():
    from typer.testing import CliRunner

    from lutq.cli import app

    known = ""
    for verb in ("quantize", "generate", "eval-ppl", "info", "build", "doctor", "bench kernel"):
        known += CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--help"}
    assert flags, "no flags found"
    for flag in flags:
        assert re.search(rf"{flag}(?![\w-])", known), flag
    assert set(FIELDS) >= {"bits", "group", "method"}
