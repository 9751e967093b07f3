"""scripts/decode_report.py: the tables of made-up results, joined results, and the paper's figures as they were published."""

import importlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lutq.decode.measure import KINDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The script over results in tmp_path, with a README there."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module, readme = (importlib.import_module(name) for name in ("decode_report", "readme"))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["decode_report.py"])
    begin, end = module.SECTION.marks
    (tmp_path / "README.md").write_text(f"before\n{begin}\nof earlier\n{end}\nafter\n", encoding="utf-8")
    yield module
    for name in ("decode_report", "readme"):
        del sys.modules[name]


def a_result(*records, **fields):
    """What `lutq bench decode --json` writes, of made-up figures."""
    result = {"gpu": "NVIDIA X", "driver": "1.2", "torch": "2", "cuda": "13", "lutq": "0", "date": "2026-01-01"}
    return result | {"read_ceiling_gbps": 4000.0, "records": list(records)} | fields


def a_record(model="llama-2-7b", bits=3, ms=2.0, **fields):
    record = {"model": model, "bits": bits, "group": 128, "grid": "bcq", "engine": "fast", "gpus": 1, "batch": 1, "context": 512}
    record |= {"replays": 200, "dtype": "float16", "ms": ms, "ms_p99": 1.1 * ms, "bytes": 4e9, "memory_bytes": 5.5e9}
    record |= {"kinds_ms": {kind: ms * part for kind, part in zip(KINDS, (0.7, 0.1, 0.05, 0.2), strict=True)}}
    record |= {
        "date": "2026-01-01",
        "prompt_tokens": 512,
        "first_token_ms": 33.3,
        "tokens_per_second": 1000 / ms,
        "gbps": 4000 / ms,
    }
    return record | {"percent_of_ceiling": 100 / ms} | fields


def cells(text, *starts):
    """The row of a table whose cells start so, without its Markdown."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if all(cell.startswith(start) for cell, start in zip(row, starts, strict=False))]
    return row[len(starts) :]


def test_records_are_those_of_the_bench():
    """The made-up ones here have the fields of real ones."""
    text = (ROOT / "lutq" / "decode" / "bench.py").read_text(encoding="utf-8")
    for name in set(a_record()) - {"ms", "ms_p99"}:
        assert f'"{name}"' in text, name


def test_tables(report, tmp_path):
    records = [
        a_record("opt-175b", 3, 18.25),
        a_record("llama-1-65b", 3, 7.125, gpus=4),
        a_record(batch=8, ms=4.0, tokens_per_second=2000.0),
        a_record(bits=16, engine="graph", kinds_ms={}),
        a_record("opt-175b", 2, 1.0, context=2048),
    ]
    (tmp_path / "decode-x.json").write_text(json.dumps(a_result(*records)), encoding="utf-8")
    report.main()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (text.split("\n")[0], text.split("\n")[-2], "of earlier" in text) == ("before", "after", False)
    assert report.SECTION.tables() in text
    titles = cells(text, "model", "weights in the paper")
    assert titles == ["1 GPU, paper", "1 GPU, lutq", "2 GPUs, paper", "4 GPUs, paper", "4 GPUs, lutq", "8 GPUs, paper"]
    assert cells(text, "OPT-175B", "3 bits, OPTQ") == ["106.5", "", "", "", "", ""]
    assert cells(text, "OPT-175B", "2 bits, one scale per row") == ["40.1", "", "30.1", "23.8", "", "22.4"], "another context"
    assert cells(text, "OPT-175B", "fp16") == ["", "", "", "", "", "42.4"]
    assert "| OPT-175B | 3 bits, one scale per row | 51.6 | **18.2** | 35.8 | 27.2 |  | 24.2 |" in text
    assert cells(text, "LLaMA-65B", "3 bits, AWQ weights") == ["31.3", "", "23.0", "18.3", "**7.12**", ""]
    assert cells(text, "llama-1-65b, 4 GPUs", "3")[:2] == ["1", "512"]
    assert "with torch 2 on X. A step" in text
    assert "4.00 TB/s" in text
    row = ["512", "4.00", "4.40", "2000", "0.50", "25", "70 / 10 / 5 / 20", "5.50", "33.3", "2026-01-01"]
    assert cells(text, "llama-2-7b", "3", "8") == row
    assert cells(text, "llama-2-7b, engine graph", "16")[7] == ""
    assert "![Time of a step](scripts/results/decode-x.png)" in text
    assert (tmp_path / "decode-x.png").stat().st_size > 1000


def test_no_results(report):
    assert report.SECTION.tables() == ""
    with pytest.raises(SystemExit, match=r"^there is no decode-\*.json in scripts/results: run bash scripts/decode.sh "):
        report.main()


def test_published_figures(report):
    """Every figure once more, in the order of the issue's list."""
    opt, large, small = (report.PUBLISHED[name][2] for name in ("opt-175b", "llama-1-65b", "llama-1-30b"))
    by_gpus = {gpus: [row.ms[gpus] for row in reversed(opt[2:]) if gpus in row.ms] for gpus in (1, 2, 4, 8)}
    assert by_gpus == {
        1: [30.4, 40.1, 51.6],
        2: [25.2, 30.1, 35.8, 41.2],
        4: [20.3, 23.8, 27.2, 30.1],
        8: [20.1, 22.4, 24.2, 25.8],
    }
    assert [(row.method, row.ms) for row in opt[:2]] == [("", {8: 42.4}), ("OPTQ", {1: 106.5})]
    assert [list(row.ms.values()) for row in small] == [[43.6, 25.1, 16.9], [20.7, 15.5, 12.2], [18.1, 13.7, 11.2]]
    assert [list(row.ms.values()) for row in large] == [[46.9, 29.1], [35.7, 25.4, 19.9], [31.3, 23.0, 18.3]]


def test_joined_results(report, tmp_path, monkeypatch):
    first = a_result(a_record(ms=2.0), a_record(bits=2, ms=1.0))
    second = a_result(a_record(ms=4.0), a_record(batch=8), date="2026-01-02", read_ceiling_gbps=5000.0)
    for name, result in (("one", first), ("two", second)):
        (tmp_path / name).write_text(json.dumps(result), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["decode_report.py", "--join", str(tmp_path / "out"), str(tmp_path / name)])
        report.main()
    joint = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert [(r["bits"], r["batch"], r["ms"]) for r in joint["records"]] == [(3, 1, 4.0), (2, 1, 1.0), (3, 8, 2.0)]
    assert [r["percent_of_ceiling"] for r in joint["records"]] == [20.0, 80.0, 40.0]
    assert (joint["date"], joint["read_ceiling_gbps"]) == ("2026-01-02", 5000.0)
    with pytest.raises(SystemExit, match="of gpu NVIDIA X and NVIDIA Y are not joined"):
        report.join([first, a_result(gpu="NVIDIA Y")])


def test_commands_that_measure(tmp_path):
    """scripts/decode.sh over a stand-in that counts its runs and fails in the third: what was measured is kept."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"""#!{sys.executable}
import json, os, subprocess, sys
if sys.argv[1] == "-c":  # how many GPUs there are
    sys.exit(print(5))
if sys.argv[1] != "-m":
    sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
several = sys.argv[1:4] == ["-m", "torch.distributed.run", "--standalone"]
gpus, args = (int(sys.argv[5]), sys.argv[6:]) if several else (1, sys.argv[1:])
assert args[:4] == ["-m", "lutq", "bench", "decode"], sys.argv
args = args[4:]
value = lambda flag: [args[i + 1] for i, arg in enumerate(args) if arg == flag]
with open({str(tmp_path / "runs")!r}, "a") as file:
    print(*args, file=file)
runs = len(open({str(tmp_path / "runs")!r}).readlines())
record = json.loads({json.dumps(a_record())!r})
records = [record | {{"model": value("--shape")[0], "bits": int(b), "batch": int((value("--batch") or [1])[0]), "gpus": gpus}}
           for b in value("--bits")]
open(value("--json")[0], "w").write(json.dumps(json.loads({json.dumps(a_result())!r}) | {{"records": records}}))
sys.exit(runs == 3)
""")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    command = ["bash", ROOT / "scripts" / "decode.sh", tmp_path / "out.json"]
    environment = os.environ | {"PYTHON": str(stand_in)}
    assert subprocess.run(command, env=environment, timeout=300).returncode == 1, "the third run fails"
    assert (tmp_path / "out.json.part").is_file()
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 5
    subprocess.run(command, env=environment, timeout=300, check=True)
    found = [(r["model"], r["bits"], r["batch"], r["gpus"]) for r in json.loads((tmp_path / "out.json").read_text())["records"]]
    large = ("llama-1-30b", "llama-1-65b", "opt-175b")
    assert sorted(found) == sorted(
        [("opt-175b", 2, 1, 1), ("llama-3-8b", 3, 1, 1), ("llama-2-7b", 3, 8, 1)]
        + [("llama-2-7b", bits, 1, 1) for bits in (2, 3, 4, 16)]
        + [(name, 3, 1, gpus) for name in large for gpus in (1, 2, 4)]
        + [(name, 4, 1, 1) for name in large[:2]]
    )
    assert not (tmp_path / "out.json.part").exists()
