"""Text that a model writes itself: drawn from its own distribution, of ordinary tokens, the same for the same seed."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from lutq.errors import LutqError
from lutq.hf import load
from lutq.samples import CACHE, continue_windows, growing_cache, ordinary_tokens, start_token, windows_at_once, write_windows
from lutq.tokens import load_tokenizer


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_windows(tiny, family):
    path, cpu = tiny(family), torch.device("cpu")
    tokenizer = load_tokenizer(path)
    windows = write_windows(path, tokenizer, 5, 128, 0, cpu)
    assert (windows.shape, windows.dtype) == ((5, 128), torch.int64)
    assert not set(windows.flatten().tolist()) & set(tokenizer.all_special_ids), f"{family=}"
    assert windows.max() < len(tokenizer), f"{family=}"
    assert len(set(windows[:, 0].tolist())) > 1, f"{family=}: every window begins alike"
    assert torch.equal(windows, write_windows(path, tokenizer, 5, 128, 0, cpu)), f"{family=}"
    assert not torch.equal(windows, write_windows(path, tokenizer, 5, 128, 1, cpu)), f"{family=}"


def test_ordinary_tokens(tiny):
    tokenizer = load_tokenizer(tiny("opt"))
    ordinary = ordinary_tokens(tokenizer, len(tokenizer) + 3)
    assert ordinary.sum() == len(tokenizer) - len(set(tokenizer.all_special_ids))
    assert not ordinary[-3:].any(), "logits that stand for no token"


def test_texts_begin_as_the_tokenizer_lets_them(tiny):
    path, cpu = tiny("opt"), torch.device("cpu")
    tokenizer = load_tokenizer(path)
    assert tokenizer("word").input_ids[0] == start_token(tokenizer) == 2  # </s>
    model = load(path, device="cpu")
    first = torch.full((3, 1), 2)
    ordinary = ordinary_tokens(tokenizer, model.config.vocab_size)
    wanted = continue_windows(model, first, 9, ordinary, torch.Generator().manual_seed(4))
    assert torch.equal(write_windows(path, tokenizer, 3, 8, 4, cpu), wanted[:, 1:])


def test_a_tokenizer_without_a_start_makes_texts_begin_anywhere(tiny):
    path = tiny("opt")
    tokenizer = load_tokenizer(path)
    tokenizer._tokenizer.post_processor = tokenizers.processors.Sequence([])  # it puts nothing before a text any more
    assert start_token(tokenizer) == tokenizer.bos_token_id == 2
    tokenizer.bos_token = None
    assert start_token(tokenizer) is None
    windows = write_windows(path, tokenizer, 50, 4, 0, torch.device("cpu"))
    assert windows.shape == (50, 4)
    assert len(set(windows[:, 0].tolist())) > 40, "tokens drawn evenly from 4096"


def test_tokens_follow_the_models_distribution(tiny):
    model = load(tiny("llama"), device="cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30  # far from even
    ordinary = torch.ones(model.config.vocab_size, dtype=torch.bool)
    ordinary[::2] = False
    start = torch.full((20000, 1), 5)
    drawn = continue_windows(model, start, 2, ordinary, torch.Generator().manual_seed(0))[:, 1]
    with torch.no_grad():
        chances = model(start[:1]).logits[0, -1].double().masked_fill(~ordinary, -torch.inf).softmax(-1)
    counts = drawn.bincount(minlength=len(chances))
    assert counts[::2].sum() == 0
    deviation = (counts - 20000 * chances).abs() / (20000 * chances * (1 - chances)).clamp(min=1).sqrt()
    assert chances.max() > 4 / len(chances), "too even to tell anything"
    assert deviation.max() < 5, f"{deviation.max()=} standard deviations"


def test_the_cache_does_not_change_what_follows(tiny):
    model = load(tiny("opt"), device="cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1000  # one token is all but certain
    ordinary = torch.ones(model.config.vocab_size, dtype=torch.bool)
    window = continue_windows(model, torch.tensor([[7]]), 24, ordinary, torch.Generator().manual_seed(0))
    with torch.no_grad():
        likeliest = model(window).logits[0, :-1].argmax(-1)
    assert torch.equal(window[0, 1:], likeliest)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_gpu_writes_as_many_as_its_cache_holds(tiny, family):
    model = load(tiny(family), device="cpu")
    assert windows_at_once(model, 1024) == 16
    assert windows_at_once(model, 100000) == 1
    cache = growing_cache(64)
    model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    taken = sum(part.nbytes for layer in cache.layers for part in layer.memory)  # for one window of 64
    assert windows_at_once(model.to("meta"), 64) == CACHE // taken, f"{family=}"
    assert windows_at_once(model, CACHE) == 1, f"{family=}"


def test_damaged_model_is_one_sentence(tiny, tmp_path, lutq_command):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = lutq_command("quantize", tmp_path / "model", "--method", "feedback", "--calib", "own", "--device", "cpu")
    assert result.returncode == 2, f"{result}"
    assert "predicts NaN or infinite values in its own text" in result.stderr, result.stderr
    with pytest.raises(LutqError, match="give an undamaged model"):
        write_windows(tmp_path / "model", load_tokenizer(tmp_path / "model"), 2, 8, 0, torch.device("cpu"))


def test_a_checkpoint_says_who_wrote_the_text(tiny, tmp_path, lutq_command):
    flags = ("--bits", 2, "--group", 32, "--method", "feedback", "--calib", "own", "--calib-windows", 3, "--calib-length", 20)
    result = lutq_command("quantize", tiny("opt"), *flags, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "3 windows of 20 tokens: written by the model itself" in result.stdout, result.stdout
    settings = json.loads((tmp_path / "lutq-out" / "config.json").read_text())["quantization_config"]["settings"]
    record = settings["calibration"]
    assert (record["source"], record["windows"], record["length"]) == ("written by the model itself", 3, 20)
    assert len(record["sha256"]) == 64
