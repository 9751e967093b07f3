"""For tests of engines: one prompt continued; a model with special layers that every engine takes, its texts by each of them."""

import torch
from conftest import MODELS, build_model, copy_tokenizer

from lutq.decode.loop import continue_texts
from lutq.generate import Sampling, generate
from lutq.hf import load
from lutq.quantize import quantize_checkpoint
from lutq.tokens import load_tokenizer


def continue_text(engine, ids, count, stop, put):
    """`continue_texts` for one prompt [1, T]; `put` gets each token."""
    return continue_texts(engine, ids, [count], stop, lambda _, token: put(token))[0]


def quantize_deep(monkeypatch, folder, settings):
    """Directory of the model `deep`, quantized, with 184 inner features: no whole words, but a multiple of 8, as `fast` wants."""
    kind, fields = MODELS["deep"]
    monkeypatch.setitem(MODELS, "deep", (kind, fields | {"intermediate_size": 184}))
    (folder / "in").mkdir()
    build_model("deep").half().save_pretrained(folder / "in")
    copy_tokenizer(folder / "in")
    quantize_checkpoint(folder / "in", folder / "out", settings, device="cpu")
    return folder / "out"


def check_engines(folder, model, engines):
    """Logits of a model on the GPU are those of the reference on the CPU, and all engines give the same text."""
    tokens = torch.arange(3, 19, device="cuda")[None]
    with torch.no_grad():
        wanted = load(folder, device="cpu")(tokens.cpu()).logits
        error = ((model(tokens).logits.float().cpu() - wanted).norm() / wanted.norm()).item()
    assert error < 2e-2, f"{error=}"
    tokenizer = load_tokenizer(folder)
    texts = {
        engine: generate(model, tokenizer, "a b", Sampling(max_new_tokens=16, temperature=0.0), engine=engine).text
        for engine in engines
    }
    assert len(set(texts.values())) == 1, texts
