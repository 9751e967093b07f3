"""Rows of perplexity figures that go through the whole path, kept in a file of scripts/results, and the plot of them."""

import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import lutq
from lutq.data import load_text
from lutq.runtime import device_name, resolve_device
from lutq.source import locate
from lutq.tokens import load_tokenizer


def prepare(model: str, protocol: str, device: str) -> tuple[Path, Any, str, dict[str, Any]]:
    """A model's directory, its tokenizer, the text of WikiText-2 by a protocol, and the `environment` of its figures."""
    transformers.utils.logging.disable_progress_bar()
    path, name = locate(model)
    where = device_name(resolve_device(device)).split(",")[0]
    return path, load_tokenizer(path), load_text("wikitext2", protocol), environment(name, protocol, where)


def environment(name: str, protocol: str, device: str) -> dict[str, Any]:
    """What the figures of a model depend on, besides the settings of each row; device in words."""
    what = {"model": name, "protocol": protocol, "dataset": "WikiText-2 raw test", "dtype": "float32"}
    return what | machine(device)


def machine(device: str) -> dict[str, str]:
    """What did the work, and when; device in words."""
    return {
        "device": device,
        "lutq": lutq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def measure_rows(
    file: Path, settings: dict[str, Any], rows: Iterable[tuple], key: str, measure_row: Callable[..., dict[str, Any]]
) -> None:
    """Add a record for each row (name, bits, group) to the file; those it already holds from the same settings are kept."""
    result = settings | {"records": []}
    if file.exists():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if {name: value for name, value in earlier.items() if name not in ("date", "records")}.items() <= result.items():
            result["records"] = earlier["records"]
    for row in rows:
        if row in [(record[key], record["bits"], record["group"]) for record in result["records"]]:
            continue
        result["records"].append(measure_row(*row))
        print(result["records"][-1], flush=True)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
