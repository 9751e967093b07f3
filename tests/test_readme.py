"""The README says what the repository does: its tables, recipe, file names and flags are checked against it."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from lutq.config import FIELDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("perplexity_report", 2),
        ("quality_report", 2),
        ("precisions_report", 1),
        ("residual_report", 1),
        ("corrections_report", 2),
        ("cpu_report", 1),
        ("kernel_report", 1),
        ("decode_report", 1),
    ],
)
def test_tables_are_those_of_the_results(monkeypatch, script, results):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    report = importlib.import_module(script)

    begin, end = report.SECTION.marks
    assert README.split(begin)[1].split(end)[0].strip() == report.SECTION.tables().strip()
    assert len(report.SECTION.results()) == results
    for name in (script, "readme"):
        del sys.modules[name]


def test_recipe_is_the_shipped_one():
    assert (ROOT / "configs" / "mixed-3bit.toml").read_text(encoding="utf-8").strip() in README


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:scripts|configs|lutq|tests)/[\w./-]+\.(?:sh|py|toml|md|png)", README)))
)
def test_named_files_exist(path):
    assert (ROOT / path).is_file(), path


def test_every_module_is_in_the_file_tree():
    tree = README.split("## Files")[1].split("## Limits")[0]
    for module in (ROOT / "lutq").rglob("*.py"):
        if not module.stem.startswith("__"):
            assert re.search(rf"\b{module.stem}\b", tree), module.stem


def test_named_flags_exist():
    from typer.testing import CliRunner

    from lutq.cli import app

    known = ""
    for verb in ("quantize", "generate", "eval-ppl", "info", "build", "doctor", "bench kernel", "bench decode"):
        known += CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--help", "--nproc-per-node"}
    assert flags, "no flags found"
    for flag in flags:
        assert re.search(rf"{flag}(?![\w-])", known), flag
    assert set(FIELDS) >= {"bits", "group", "method"}
