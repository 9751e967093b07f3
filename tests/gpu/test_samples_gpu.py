"""Text that a model writes itself on a GPU: by the fast engine, the same for the same seed, and as likely as on the CPU."""

import pytest
import torch

from lutq import samples
from lutq.hf import load
from lutq.samples import write_windows
from lutq.source import locate
from lutq.tokens import load_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_windows(monkeypatch):
    path, gpu = locate(None)[0], torch.device("cuda")
    tokenizer, engines = load_tokenizer(path), []
    make = samples.fast_engine
    monkeypatch.setattr(samples, "fast_engine", lambda *a: engines.append(make(*a)) or engines[-1])
    state = torch.cuda.get_rng_state()
    windows = write_windows(path, tokenizer, 37, 200, 0, gpu)
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert engines[0] is not None, "the fast engine takes it"
    assert (windows.shape, windows.dtype) == ((37, 200), torch.int64)
    assert not set(windows.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert torch.equal(windows, write_windows(path, tokenizer, 37, 200, 0, gpu))
    assert not torch.equal(windows, write_windows(path, tokenizer, 37, 200, 1, gpu))

    model = load(path, device="cpu", dtype="float32")

    def likelihood(tokens):
        with torch.no_grad():
            chances = model(tokens).logits[:, :-1].log_softmax(-1)
        return chances.gather(2, tokens[:, 1:, None]).mean().item()

    found, wanted = likelihood(windows), likelihood(write_windows(path, tokenizer, 37, 200, 0, torch.device("cpu")))
    assert abs(found - wanted) < 0.1 * abs(wanted), f"{found=} {wanted=}"
