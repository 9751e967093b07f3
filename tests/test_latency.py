"""Times of products: each measured once, kept in the journal, and the same after a way through JSON."""

import json

import pytest
import torch
from conftest import CPU_BACKEND

from lutq import latency
from lutq.config import LayerConfig
from lutq.journal import Journal, StaleRunError
from lutq.latency import Product, Times, from_json, measure, record, time_plain, to_json, words
from lutq.ops import BACKENDS

LAYERS = [LayerConfig(2, 64), LayerConfig(4, 0, "uniform"), LayerConfig(1, 32, offsets=False), LayerConfig(3, 128)]


def test_each_product_is_measured_once_and_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "time_plain", lambda product, *_: calls.append(product) or 1.5 * len(calls))
    products = [Product(N, 96, layer) for N in (64, 96) for layer in LAYERS]
    journal = Journal(tmp_path, {}, "")
    first = measure(iter(products + products), torch.device("cpu"), journal)
    assert calls == products
    assert first.ns == {product: 1500 * number for number, product in enumerate(products, 1)}
    assert first.backend == CPU_BACKEND
    assert first.device.startswith("CPU, ")
    assert measure(products, torch.device("cpu"), journal) != first, "this journal was opened before the times were written"
    journal.close()
    journal, count = Journal(tmp_path, {}, ""), len(calls)
    assert measure(products, torch.device("cpu"), journal) == first
    assert len(calls) == count, "measured again"
    journal.close()


def test_times_of_another_device_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "time_plain", lambda *_: 1.0)
    journal = Journal(tmp_path, {}, "start again")
    measure([Product(64, 96, LAYERS[0])], torch.device("cpu"), journal)
    journal.close()
    journal = Journal(tmp_path, {}, "start again")
    monkeypatch.setattr(latency, "device_name", lambda device: "CPU, 77 threads")
    measure([], torch.device("cpu"), journal)
    monkeypatch.setattr(latency, "device_name", lambda device: "NVIDIA X")
    with pytest.raises(StaleRunError, match=rf"timed on CPU, .* and this is NVIDIA X \(backend {CPU_BACKEND}\): start again$"):
        measure([], torch.device("cpu"), journal)
    journal.close()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_larger_product_takes_longer(layer):
    for backend in dict.fromkeys((CPU_BACKEND, "reference")):
        small, large = (time_plain(Product(size, size, layer), torch.device("cpu"), backend) for size in (32, 2048))
        assert 0 < small < large, f"{layer=} {backend=} {small=} {large=}"


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_timed_is_the_backend_on_record(tmp_path, monkeypatch, layer):
    ran = set()
    for name, multiply in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, lambda *given, name=name, multiply=multiply: ran.add(name) or multiply(*given))
    journal = Journal(tmp_path, {}, "")
    times = measure([Product(64, 96, layer)], torch.device("cpu"), journal)
    journal.close()
    assert ran == {times.backend} == {CPU_BACKEND}, f"{layer=}"


def test_json_and_back():
    times = Times("some GPU", "cuda", {Product(64 * n, 172, layer): 1000 + n for n, layer in enumerate(LAYERS, 1)})
    assert from_json(json.loads(json.dumps(to_json(times)))) == times
    kept = json.loads(json.dumps(record(times, 0.25, 123456)))
    assert from_json(kept) == times
    for part in ("predicted 0.1235 ms per token", "of 0.25 allowed", "some GPU", "backend cuda"):
        assert part in words(kept), words(kept)
