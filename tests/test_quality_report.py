"""scripts/quality_report.py: the tables of made-up results, and figures at equal bits per weight."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ENVIRONMENT = {"dataset": "text", "protocol": "raw", "dtype": "float32", "device": "CPU", "torch": "2", "date": "today"}


@pytest.fixture
def report(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("quality_report")
    for name in ("quality_report", "perplexity_report", "readme"):
        del sys.modules[name]


def record(row, bits, bits_per_weight, ppl, **more):
    sizes = {"bits_per_weight": bits_per_weight, "whole_model": bits_per_weight + 4}
    return {"row": row, "bits": bits, "group": 128, **sizes, "ppl": ppl, "windows": 5, **more}


def result(model, *records):
    return ENVIRONMENT | {"model": model, "records": [record("fp16", 16, 16.0, 10.0), *records]}


def test_cells_have_bits_per_weight_of_layers_and_model(report):
    table = report.markdown(result("unknown", record("rtn", 4, 4.1875, 12.0), record("calibrated", 3, 3.5, 15.0)))
    assert "| `--method rtn` | 12.00 (4.19 / 8.19) |  |" in table.splitlines()
    assert "| `--recipe calibrated` |  | 15.00 (3.50 / 7.50) |" in table.splitlines()
    assert "equal bits" not in table  # nothing is quoted for this model


@pytest.mark.parametrize(
    ("width", "expected"),
    [(4.0, "10.00"), (4.005, "10.00"), (3.0, "≈31.62"), (2.0, "100"), (1.9, ""), (4.2, "")],
)
def test_at(report, width, expected):
    assert report.at([(4.0, 10.0), (2.0, 100.0)], width) == expected, f"{width=}"


def test_at_of_no_points(report):
    assert report.at([], 3.0) == ""


def test_quoted_counts_scales_and_zero_points(report):
    assert report.quoted({4: 60.0}, 128) == [(4 + 20 / 128, 60.0)]
    assert report.quoted({4: 60.0}, 64, zero_bits=16) == [(4.5, 60.0)]


def test_comparison_is_where_both_have_figures(report, monkeypatch):
    monkeypatch.setattr(report, "QUOTED", {"small": {"other (quoted)": [(3.0, 90.0), (2.0, 900.0)]}})
    table = report.comparison(result("small", record("best-4bit", 4.0, 4.5, 10.0), record("best-2bit", 2.0, 2.5, 40.0)))
    assert table.splitlines()[2:] == [
        "| | 3.00 | 2.50 |",  # not 4.50, where the other has none, and not 2.00, where the recipes have none
        "|---|---|---|",
        "| `--recipe best-...` | ≈28.28 | 40.00 |",
        "| other (quoted) | 90.00 | ≈285 |",
    ]


def test_timing_is_the_better_run(report):
    timed = [record("calibrated", bits, 4.5, 9.0, command_seconds=[61.2, 50.4], threads=2) for bits in (4, 3)]
    assert "takes 50 / 50 s at 4 / 3 bits" in report.timing(timed)
    assert report.timing([record("calibrated", 4, 4.5, 9.0)]) == ""


def test_plot_has_what_is_quoted(report):
    made_up = result("opt-tiny", record("best-4bit", 4, 4.5, 10.0), record("feedback --sweeps 0", 4, 4.5, 12.0))
    shown = report.plotted(report.with_quoted(made_up)["records"])
    assert list(shown) == ["best-...", "GPTQ (quoted)", "GPTQ, group-aware order (quoted)"]
