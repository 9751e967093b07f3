"""Results in scripts/results and the tables that the report scripts make of them in the README."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"


def read(pattern: str) -> list[dict[str, Any]]:
    """Results in order of file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def settings_of(result: dict[str, Any], windows: int) -> str:
    """What a result's figures are of, for a table of `scripts/measured.py`'s records."""
    device = result["device"].removeprefix("NVIDIA ")
    return (
        f"{result['dataset']}, protocol `{result['protocol']}`, {windows} windows, {result['dtype']} on {device}, "
        f"torch {result['torch']}, {result['date']}"
    )


def write(begin: str, tables: str, end: str) -> None:
    """Put the tables between two marks of the README."""
    readme = ROOT / "README.md"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    text = readme.read_text(encoding="utf-8")
    readme.write_text(pattern.sub(lambda _: f"{begin}\n{tables}\n{end}", text), encoding="utf-8")
