"""The record of an unfinished run: what it keeps, what it forgives, and whom it lets continue."""

import json
import subprocess
import sys

import pytest
import torch

from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.journal import NAME, Journal, fingerprint

IDENTITY = {"lutq": "0.1.0", "bits": 3, "source_config": {"hidden_size": 256, "layers": [1, 2]}, "overrides": {}}
RECORDS = [{"unit": f"layers.{n}", "sha256": fingerprint(torch.tensor([n])), "error": 0.1 * n} for n in range(4)]

HOLDER = """
import sys
from pathlib import Path
from lutq.journal import Journal

journal = Journal(Path(sys.argv[1]), {"bits": 3}, "remedy")
print("locked", flush=True)
sys.stdin.read()
"""


def start(folder, identity=IDENTITY, remedy="start again"):
    return Journal(folder, identity, remedy)


def written(folder, records=RECORDS):
    """The bytes of a journal with these records."""
    journal = start(folder)
    for record in records:
        journal.add(record)
    journal.close()
    return (folder / NAME).read_bytes()


def test_new_journal_is_empty(tmp_path):
    journal = start(tmp_path)
    assert journal.records == []
    journal.close()
    assert json.loads((tmp_path / NAME).read_text()) == IDENTITY


def test_records_are_kept_in_order(tmp_path):
    data = written(tmp_path)
    assert [json.loads(line) for line in data.splitlines()] == [IDENTITY, *RECORDS]
    journal = start(tmp_path)
    assert journal.records == RECORDS
    journal.add({"unit": "last"})
    journal.close()
    journal = start(tmp_path)
    assert journal.records == [*RECORDS, {"unit": "last"}]
    journal.close()


def test_a_record_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    journal = start(tmp_path)
    for count, record in enumerate(RECORDS, 1):
        journal.add(record)
        lines = (tmp_path / NAME).read_text().splitlines()
        assert [json.loads(line) for line in lines] == [IDENTITY, *RECORDS[:count]], f"{count=}"
    journal.close()


def test_cut_anywhere(tmp_path):
    """A crash leaves any number of whole lines and a piece of the next, which does not count."""
    data = written(tmp_path)
    ends = [n for n, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted({*range(0, len(data), 19), *(end + d for end in ends for d in (-1, 0, 1))}):  # 0, 1: without it, with it
        (tmp_path / NAME).write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        journal = start(tmp_path)
        assert journal.records == RECORDS[: max(0, whole - 1)], f"{size=} {journal.records=}"
        journal.add({"unit": "after"})
        journal.close()
        lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
        assert lines == [IDENTITY, *RECORDS[: max(0, whole - 1)], {"unit": "after"}], f"{size=} {lines=}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bits": 4}, ["bits: 3 -> 4"]),
        ({"lutq": "0.2.0"}, ["lutq: '0.1.0' -> '0.2.0'"]),
        ({"bits": 2, "lutq": "0.2.0"}, ["bits: 3 -> 2", "lutq: '0.1.0' -> '0.2.0'"]),
        ({"source_config": {"hidden_size": 512, "layers": [1, 2]}}, ["source_config.hidden_size: 256 -> 512"]),
        ({"source_config": {"hidden_size": 256, "layers": [1, 3]}}, ["source_config.layers: [1, 2] -> [1, 3]"]),
        ({"source_config": {"hidden_size": 256}}, ["source_config.layers: [1, 2] -> None"]),
        ({"overrides": {"fc2$": {"bits": 4}}}, ["overrides.fc2$: None -> {'bits': 4}"]),
        ({"new": True}, ["new: None -> True"]),
    ],
)
def test_another_identity_is_refused_by_what_changed(tmp_path, change, expected):
    data = written(tmp_path)
    with pytest.raises(LutqError) as caught:
        start(tmp_path, IDENTITY | change, remedy="do this or that")
    message = str(caught.value)
    assert message.endswith(f"({'; '.join(expected)}): do this or that"), f"{change=} {message=}"
    assert str(tmp_path) in message, f"{change=} {message=}"
    assert "hidden_size" in message or "hidden_size" not in str(expected), f"{change=} {message=}"
    assert (tmp_path / NAME).read_bytes() == data, "a refused run leaves the journal as it was"
    journal = start(tmp_path)  # and released
    assert journal.records == RECORDS, f"{change=} {journal.records=}"
    journal.close()


def test_what_json_cannot_tell_apart_is_the_same(tmp_path):
    for shape in ((1, 2), [1, 2], (1, 2)):
        Journal(tmp_path, {"shape": shape}, "").close()


def test_overrides_in_another_order_are_another_run(tmp_path):
    """A later table wins, so their order is a setting: the same tables turned around give other layers other bits."""
    tables = {r"layers\.0\.": {"bits": 2}, "fc2$": {"bits": 4}}
    config, turned = (QuantConfig(overrides=dict(items)) for items in (tables.items(), reversed(tables.items())))
    assert config.layer("layers.0.fc2").bits == 4
    assert turned.layer("layers.0.fc2").bits == 2
    Journal(tmp_path, config.to_dict(), "").close()
    with pytest.raises(LutqError, match="overrides"):
        Journal(tmp_path, turned.to_dict(), "")


def test_two_in_one_process(tmp_path):
    journal = start(tmp_path)
    with pytest.raises(LutqError, match="another lutq quantize is writing to"):
        start(tmp_path)
    journal.add(RECORDS[0])  # the first is not disturbed
    journal.close()
    journal = start(tmp_path)
    assert journal.records == RECORDS[:1]
    journal.close()


def test_another_process_at_work_is_refused(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(LutqError, match="another lutq quantize is writing to") as caught:
                Journal(tmp_path, {"bits": 3}, "remedy")
            assert str(tmp_path) in str(caught.value), f"{caught.value}"
            assert "--out" in str(caught.value), f"{caught.value}"
        finally:
            holder.kill()  # as abrupt as it gets; the lock goes with the process
    Journal(tmp_path, {"bits": 3}, "remedy").close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_check_takes_the_same_tensor_only(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    journal = start(tmp_path, remedy="do this or that")
    record = {"unit": "layers.0.fc1", "sha256": fingerprint(tensor)}
    journal.check(record, tensor.clone())
    journal.check(record, tensor.T.contiguous().T)  # the same, laid out otherwise
    for wrong in (tensor.roll(1), tensor[:2], torch.cat([tensor, tensor]), torch.zeros_like(tensor), tensor[:0]):
        with pytest.raises(LutqError) as caught:
            journal.check(record, wrong)
        message = str(caught.value)
        assert "the source changed" in message, f"{dtype=} {message=}"
        assert "layers.0.fc1" in message, f"{dtype=} {message=}"
        assert message.endswith(": do this or that"), f"{dtype=} {message=}"
    start(tmp_path).close()  # refusing has released the lock


def test_fingerprint_sees_every_bit():
    tensor = torch.zeros(4, 8, dtype=torch.float16)
    seen = {fingerprint(tensor)}
    for k in range(32):
        changed = tensor.clone()
        changed.view(torch.int16).view(-1)[k] = 1
        seen.add(fingerprint(changed))
    seen.add(fingerprint(-tensor))  # minus zero
    assert len(seen) == 34, f"{len(seen)=}"
    assert fingerprint(torch.empty(0)) != fingerprint(torch.empty(0, 3))  # the shape counts too
