"""Shards: what safetensors reads back, where they are cut, and that no interruption leaves a trace."""

import errno
import itertools
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lutq.errors import LutqError
from lutq.shards import DTYPE_NAMES, ShardWriter, Spec

quick = settings(deadline=None, max_examples=40)


def random_tensor(shape, dtype, seed=0):
    """Any bits at all, NaN among them; of a bool, any truth."""
    random = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=random) < 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=random, dtype=torch.uint8).view(dtype).reshape(shape)


def specs_of(tensors):
    return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write_all(folder, tensors, written=(), **limit):
    """One run from the first tensor to the last, each noted when it is flushed; the writer."""
    writer = ShardWriter(folder, specs_of(tensors), set(written), **limit)
    for name, tensor in tensors.items():
        if name not in written:
            writer.write(name, tensor)
            writer.flush()
    writer.close()
    writer.write_index()
    return writer


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_all(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a handle is not a dict
    return found


def check_equal(found, tensors, about):
    assert found.keys() == tensors.keys(), f"{about} {found.keys()=}"
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, f"{about} {name} {found[name].dtype=}"
        assert found[name].shape == tensor.shape, f"{about} {name} {found[name].shape=}"
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]  # NaN is not equal to itself
        assert torch.equal(*bits), f"{about} {name}"


# every dtype, between single bytes that would put the next one out of line, and tensors without any data
MIXED = {}
for number, some_dtype in enumerate(DTYPE_NAMES):
    MIXED[f"odd.{number}"] = random_tensor((2 * number + 1,), torch.uint8, seed=number)
    MIXED[f"tensor.{number}"] = random_tensor((3, 2), some_dtype, seed=number)
    MIXED[f"empty.{number}"] = torch.empty((0,) if number % 2 else (2, 0, 3), dtype=some_dtype)
    MIXED[f"scalar.{number}"] = random_tensor((), some_dtype, seed=number)


@pytest.mark.parametrize("limit", [1, 64, 200, 10**9])
def test_every_dtype_is_read_back(tmp_path, limit):
    writer = write_all(tmp_path, MIXED, limit=limit)
    check_equal(read_all(tmp_path), MIXED, f"{limit=}")
    assert (len(writer.files) == 1) == (limit == 10**9), f"{limit=} {writer.files=}"


def test_every_tensor_is_aligned(tmp_path):
    write_all(tmp_path, MIXED)
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0, f"{length=}"
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        begin = 8 + length + entry["data_offsets"][0]
        assert begin % MIXED[name].dtype.itemsize == 0, f"{name} {begin=} {MIXED[name].dtype=}"
    assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in header.values()), f"{len(data)=}"


@quick
@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(list(DTYPE_NAMES))), min_size=1, max_size=12
    ),
    limit=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tensors_are_read_back(tmp_path_factory, shapes, limit, seed):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"layers.{n}.weight": random_tensor(shape, dtype, seed + n) for n, (shape, dtype) in enumerate(shapes)}
    writer = write_all(folder, tensors, limit=limit)
    about = f"{shapes=} {limit=} {seed=}"
    check_equal(read_all(folder), tensors, about)
    for number, file in enumerate(writer.files):
        names = [name for name in tensors if writer.shard_of[name] == number]
        size = sum(tensors[name].nbytes for name in names)
        assert names, f"{about} {file} is empty"
        assert size <= limit or len([name for name in names if tensors[name].nbytes]) == 1, f"{about} {file} {size=}"


@pytest.mark.parametrize(
    "tensor",
    [
        random_tensor((5, 4), torch.float32).T,
        random_tensor((9, 4), torch.float16)[::2],
        random_tensor((4,), torch.bfloat16).expand(3, 4),
        torch.nn.Parameter(random_tensor((3, 4), torch.float32)),
    ],
    ids=["transposed", "strided", "expanded", "parameter"],
)
def test_tensors_of_any_layout(tmp_path, tensor):
    write_all(tmp_path, {"a": tensor})
    check_equal(read_all(tmp_path), {"a": tensor.detach()}, f"{tensor.stride()=}")


def byte_tensors(*sizes):
    return {f"t{number}": random_tensor((size,), torch.uint8, seed=number) for number, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10, 10, 10], [0, 0, 1]),
        ([20, 1], [0, 1]),
        ([10, 10], [0, 0]),
        ([50, 1, 1], [0, 1, 1]),  # larger than the limit: alone
        ([1, 50, 1], [0, 1, 2]),
        ([1, 1, 50], [0, 0, 1]),
        ([50, 60], [0, 1]),
        ([0, 20, 0, 20, 0], [0, 0, 0, 1, 1]),
        ([7], [0]),
    ],
)
def test_where_shards_are_cut(tmp_path, sizes, expected):
    tensors = byte_tensors(*sizes)
    writer = write_all(tmp_path, tensors, limit=20)
    assert list(writer.shard_of.values()) == expected, f"{sizes=} {writer.shard_of=}"
    count = expected[-1] + 1
    files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    assert writer.files == files, f"{sizes=} {writer.files=}"
    for number, file in enumerate(files):
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name in tensors if writer.shard_of[name] == number}, f"{sizes=} {file}"


def test_index(tmp_path):
    tensors = byte_tensors(10, 15, 40, 0, 3) | {"half": random_tensor((3, 2), torch.float16)}
    writer = write_all(tmp_path, tensors, limit=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 10 + 15 + 40 + 3 + 12, f"{index=}"
    assert index["weight_map"] == {name: writer.files[writer.shard_of[name]] for name in tensors}, f"{index=}"
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert name in shard.keys(), f"{name=} {file=}"  # noqa: SIM118, a handle is not a dict
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}, f"{index=}"


def test_one_file_needs_no_index(tmp_path):
    write_all(tmp_path, byte_tensors(10, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float16), torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(12)],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_another_shape_or_dtype_is_refused(tmp_path, wrong):
    writer = ShardWriter(tmp_path, {"layer.codes": Spec((3, 4), torch.float16)}, set())
    with pytest.raises(ValueError, match=r"layer\.codes") as caught:
        writer.write("layer.codes", wrong)
    for part in (str(wrong.dtype), str(tuple(wrong.shape)), "torch.float16", "(3, 4)"):
        assert part in str(caught.value), f"{part=} {caught.value}"


def test_shards_are_unfinished_until_complete(tmp_path):
    tensors = byte_tensors(10, 10, 10)
    writer = ShardWriter(tmp_path, specs_of(tensors), set(), limit=20)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    seen = []
    for name, tensor in tensors.items():
        writer.write(name, tensor)
        seen.append({path.name for path in tmp_path.iterdir()})
        writer.flush()
        seen.append({path.name for path in tmp_path.iterdir()})
    writer.close()
    assert seen == [
        {f"{first}.unfinished"},
        {f"{first}.unfinished"},
        {f"{first}.unfinished"},  # complete, but not yet on the disk for sure
        {first},
        {first, f"{second}.unfinished"},
        {first, second},
    ], f"{seen=}"


# three shards: mixed widths, so that order of writing and order in the file differ; one tensor larger than the limit
PLAN = {
    "a.codes": random_tensor((3,), torch.uint8, 1),
    "a.scales": random_tensor((4,), torch.float16, 2),
    "a.offsets": random_tensor((2,), torch.float64, 3),
    "b.weight": random_tensor((50,), torch.float32, 4),
    "c.codes": random_tensor((5,), torch.int32, 5),
    "guard": torch.empty(0, dtype=torch.float16),
}
LIMITS = (40, 10**9)


def uninterrupted(folder, limit):
    folder.mkdir()
    write_all(folder, PLAN, limit=limit)
    return contents(folder)


def noise(tensor):
    """What a power cut may leave in the place of a tensor: other bytes."""
    return random_tensor(tensor.shape, tensor.dtype, seed=99)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("unnoted", [0, 1, 2, 3])
@pytest.mark.parametrize("closed", [False, True])
def test_interrupted_after_any_tensor(tmp_path, limit, unnoted, closed):
    """The run ends after some tensors, of which the caller had not yet noted the last `unnoted` ones."""
    expected = uninterrupted(tmp_path / "whole", limit)
    names = list(PLAN)
    for count in range(len(names) + 1):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        writer = ShardWriter(folder, specs_of(PLAN), set(), limit)
        for name in names[:count]:
            writer.write(name, PLAN[name])
            writer.flush()
        if closed:
            writer.close()
        write_all(folder, PLAN, names[: max(0, count - unnoted)], limit=limit)
        assert contents(folder) == expected, f"{limit=} {unnoted=} {closed=} {count=}"


@pytest.mark.parametrize("limit", LIMITS)
def test_interrupted_within_any_tensor(tmp_path, limit):
    """The last tensor is on its way: never flushed, and only a part of it is right."""
    expected = uninterrupted(tmp_path / "whole", limit)
    names = list(PLAN)
    for count in range(len(names)):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        writer = ShardWriter(folder, specs_of(PLAN), set(), limit)
        for name in names[:count]:
            writer.write(name, PLAN[name])
            writer.flush()
        writer.write(names[count], noise(PLAN[names[count]]))
        write_all(folder, PLAN, names[:count], limit=limit)
        assert contents(folder) == expected, f"{limit=} {count=}"


@pytest.mark.parametrize("limit", LIMITS)
def test_interrupted_every_time(tmp_path, limit):
    """One tensor per run, each noted only by the run after the next: every tensor is written twice."""
    expected = uninterrupted(tmp_path / "whole", limit)
    folder, names = tmp_path / "parts", list(PLAN)
    folder.mkdir()
    for count in range(len(names)):
        writer = ShardWriter(folder, specs_of(PLAN), set(names[: max(0, count - 1)]), limit)
        for name in names[max(0, count - 1) : count + 1]:
            writer.write(name, PLAN[name])
            writer.flush()
    write_all(folder, PLAN, names[:-1], limit=limit)
    assert contents(folder) == expected, f"{limit=}"


@pytest.mark.parametrize("limit", LIMITS)
def test_interrupted_between_the_last_tensor_and_the_renaming(tmp_path, limit):
    """The caller knows of every tensor, and a shard still has the name of an unfinished one."""
    expected = uninterrupted(tmp_path / "whole", limit)
    for file in [name for name in expected if name.endswith(".safetensors")]:
        folder = tmp_path / f"{file}.folder"
        folder.mkdir()
        for name, data in expected.items():
            (folder / (f"{name}.unfinished" if name == file else name)).write_bytes(data)
        write_all(folder, PLAN, PLAN, limit=limit)
        assert contents(folder) == expected, f"{limit=} {file=}"


class Stream:
    """An open file whose writes go through `write(stream, data)`."""

    def __init__(self, stream, write):
        self._stream, self._write = stream, write

    def write(self, data):
        return self._write(self._stream, data)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()


def run_until_killed(folder, notes, limit, fatal):
    """Go on in a process of its own, which dies halfway through its write number `fatal`; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status, writes, open_file = 1, itertools.count(), Path.open

    def write(stream, data):
        if next(writes) == fatal:
            stream.write(bytes(data)[: len(data) // 2])
            stream.flush()
            os._exit(9)
        return stream.write(data)

    try:
        Path.open = lambda path, *args, **kwargs: Stream(open_file(path, *args, **kwargs), write)
        noted = notes.read_text().split() if notes.exists() else []
        writer = ShardWriter(folder, specs_of(PLAN), set(noted), limit)
        for name in [name for name in PLAN if name not in noted]:
            writer.write(name, PLAN[name])
            writer.flush()
            with open_file(notes, "a") as stream:
                stream.write(f"{name}\n")
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("limit", LIMITS)
def test_killed_within_any_write(tmp_path, limit):
    """Headers are written too: a shard that was being created when the process died must not be taken for a good one."""
    expected = uninterrupted(tmp_path / "whole", limit)
    for fatal in itertools.count():
        folder, notes = tmp_path / f"{fatal}", tmp_path / f"{fatal}.notes"
        folder.mkdir()
        status = run_until_killed(folder, notes, limit, fatal)
        write_all(folder, PLAN, notes.read_text().split() if notes.exists() else [], limit=limit)
        assert contents(folder) == expected, f"{limit=} {fatal=} {status=}"
        if status == 0:  # there were not that many writes
            break
        assert status == 9, f"{limit=} {fatal=} {status=}"
    assert fatal >= 5, f"{limit=} {fatal=}"  # one for each tensor that is not empty


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("fatal", [1, 2])
def test_killed_again_and_again(tmp_path, limit, fatal):
    expected = uninterrupted(tmp_path / "whole", limit)
    folder, notes = tmp_path / "parts", tmp_path / "notes"
    folder.mkdir()
    statuses = [run_until_killed(folder, notes, limit, fatal) for _ in range(20)]
    assert 9 in statuses, f"{limit=} {fatal=} {statuses=}"
    assert statuses[-1] == 0, f"{limit=} {fatal=} {statuses=}"
    write_all(folder, PLAN, PLAN, limit=limit)  # for the index
    assert contents(folder) == expected, f"{limit=} {fatal=} {statuses=}"


def failing(number):
    def write(stream, data):
        stream.write(bytes(data)[: len(data) // 2])  # what still had room
        raise OSError(number, "no more")

    return write


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", PLAN)
@pytest.mark.parametrize("limit", LIMITS)
def test_full_disk_within_a_tensor(tmp_path, monkeypatch, number, name, limit):
    expected = uninterrupted(tmp_path / "whole", limit)
    folder, names = tmp_path / "full", list(PLAN)
    folder.mkdir()
    before = names[: names.index(name)]
    writer = ShardWriter(folder, specs_of(PLAN), set(), limit)
    for earlier in before:
        writer.write(earlier, PLAN[earlier])
        writer.flush()
    open_file = Path.open

    def opened(path, mode="r", *args, **kwargs):  # what is opened from now on for tensors is full
        stream = open_file(path, mode, *args, **kwargs)
        return Stream(stream, failing(number)) if "+" in mode else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        if writer._stream is not None:  # and so is what is open already
            writer._stream = Stream(writer._stream, failing(number))
        if PLAN[name].numel():
            with pytest.raises(LutqError, match="the disk is full") as caught:
                writer.write(name, PLAN[name])
            assert str(folder) in str(caught.value), f"{name=} {limit=} {caught.value}"
        writer.close()
    write_all(folder, PLAN, before, limit=limit)
    assert contents(folder) == expected, f"{name=} {limit=} {number=}"


@pytest.mark.parametrize("limit", LIMITS)
def test_full_disk_while_a_shard_is_created(tmp_path, monkeypatch, limit):
    expected = uninterrupted(tmp_path / "whole", limit)
    folder = tmp_path / "full"
    folder.mkdir()
    open_file = Path.open

    def opened(path, mode="r", *args, **kwargs):
        stream = open_file(path, mode, *args, **kwargs)
        return Stream(stream, failing(errno.ENOSPC)) if set(mode) & set("wx+") else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        writer = ShardWriter(folder, specs_of(PLAN), set(), limit)
        with pytest.raises(LutqError, match="the disk is full"):
            writer.write("a.codes", PLAN["a.codes"])
        writer.close()
    write_all(folder, PLAN, limit=limit)
    assert contents(folder) == expected, f"{limit=}"


def test_other_disk_errors_are_not_called_a_full_disk(tmp_path):
    writer = ShardWriter(tmp_path, specs_of(PLAN), set())
    writer.write("a.codes", PLAN["a.codes"])
    writer._stream = Stream(writer._stream, failing(errno.EIO))
    with pytest.raises(OSError, match="no more") as caught:
        writer.write("a.scales", PLAN["a.scales"])
    assert caught.value.errno == errno.EIO, f"{caught.value=}"


@pytest.mark.parametrize("limit", LIMITS)
def test_writes_that_take_a_part_only(tmp_path, monkeypatch, limit):
    """As a write to a file of more than 2 GiB does, or one that a signal interrupts."""
    expected = uninterrupted(tmp_path / "whole", limit)
    folder = tmp_path / "parts"
    folder.mkdir()
    open_file = Path.open

    def opened(path, mode="r", *args, **kwargs):
        stream = open_file(path, mode, *args, **kwargs)
        return Stream(stream, lambda inner, data: inner.write(bytes(data[:3]))) if "+" in mode else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        write_all(folder, PLAN, limit=limit)
    assert contents(folder) == expected, f"{limit=}"


def test_a_shard_with_written_tensors_that_is_gone(tmp_path):
    writer = ShardWriter(tmp_path, specs_of(PLAN), set())
    writer.write("a.codes", PLAN["a.codes"])
    writer.close()
    (tmp_path / "model.safetensors.unfinished").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        ShardWriter(tmp_path, specs_of(PLAN), {"a.codes"})
