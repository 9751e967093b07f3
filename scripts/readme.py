"""Results in scripts/results and the tables that the report scripts make of them in the README."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"


def settings_of(result: dict[str, Any], windows: str | int) -> str:
    """What a result's figures are of, for a table of `scripts/measured.py`'s records; windows: their number, or in words."""
    device = result["device"].removeprefix("NVIDIA ")
    return (
        f"{result['dataset']}, protocol `{result['protocol']}`, {windows} windows, {result['dtype']} on {device}, "
        f"torch {result['torch']}, {result['date']}"
    )


class Section(NamedTuple):
    """What a report script writes of `scripts/results/NAME-*.json` between two marks of the README.

    markdown: a result -> its tables.
    """

    name: str
    script: str
    markdown: Callable[[dict[str, Any]], str]

    @property
    def marks(self) -> tuple[str, str]:
        """The lines before and after."""
        return f"<!-- {self.name}: written by scripts/{self.script}.py -->", f"<!-- end of {self.name} -->"

    def results(self) -> list[dict[str, Any]]:
        """In order of file name, which is `file` of each, without its suffix."""
        paths = sorted(RESULTS.glob(f"{self.name}-*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) | {"file": path.stem} for path in paths]

    def tables(self) -> str:
        """All tables, as they stand between the marks."""
        return "\n\n".join(self.markdown(result) for result in self.results())

    def write(self) -> None:
        """Put them there."""
        begin, end = self.marks
        readme = ROOT / "README.md"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text = readme.read_text(encoding="utf-8")
        readme.write_text(pattern.sub(lambda _: f"{begin}\n{self.tables()}\n{end}", text), encoding="utf-8")
