"""Engines that stay with a model (lutq/decode/keep.py) on a GPU: captured once, the same texts, no memory more every text."""

import pytest
import torch
from conftest import OPT_TINY

from lutq.decode import keep
from lutq.decode.keep import forget
from lutq.generate import Sampling, generate
from lutq.hf import load
from lutq.tokens import load_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = ("The old man walked slowly to the house, and", "In 1987 ,")


@pytest.mark.parametrize("engine", ["fast", "graph"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 3}, {"seed": 3, "repetition_penalty": 1.3}], ids=str)
def test_texts_are_those_of_new_engines(monkeypatch, engine, options):
    tokenizer, model = load_tokenizer(OPT_TINY), load(OPT_TINY, device="cuda", dtype="float16")
    made, choose = [], keep.choose
    monkeypatch.setattr(keep, "choose", lambda *arguments: made.append(engine) or choose(*arguments))

    def text(prompt):
        return generate(model, tokenizer, prompt, Sampling(max_new_tokens=24, **options), engine=engine).text

    expected = []
    for prompt in PROMPTS:
        forget(model)
        expected.append(text(prompt))
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        assert [text(prompt) for prompt in PROMPTS] == expected
    assert len(made) == len(PROMPTS)
    assert torch.cuda.memory_allocated() == held
    forget(model)
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize("engine", ["fast", "graph"])
def test_other_settings_take_no_more_memory(engine):
    tokenizer, model = load_tokenizer(OPT_TINY), load(OPT_TINY, device="cuda", dtype="float16")
    held = []
    for seed in range(6):
        sampling = Sampling(max_new_tokens=4, temperature=0.5 + seed / 10)
        generate(model, tokenizer, PROMPTS[1], sampling, engine=engine)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1], f"{held=}"
