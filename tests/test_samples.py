"""Text that a model writes itself: drawn from its own distribution, of ordinary tokens, the same for the same seed."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from lutq.errors import LutqError
from lutq.hf import load
from lutq.samples import continue_windows, decode_windows, fast_engine, ordinary_tokens, start_token, write_windows
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


@pytest.mark.parametrize(("family", "factor"), [("opt", 1), ("llama", 20)])  # of the head, which opt shares with the embedding
def test_the_engine_draws_as_the_model_predicts(tiny, family, factor):
    """On the CPU, with the engine's reference: as likely tokens as the model's own forward draws, and ordinary ones."""
    model, windows, length = load(tiny(family), device="cpu", dtype="float32"), 13, 40
    with torch.no_grad():
        model.get_output_embeddings().weight *= factor
    ordinary = torch.ones(model.config.vocab_size, dtype=torch.bool)
    ordinary[::2] = False
    engine = fast_engine(model, windows, length, ordinary)
    first = torch.full((windows, 1), 5)

    def write(seed):
        torch.manual_seed(seed)
        return decode_windows(engine, first, length)

    written = write(0)
    assert torch.equal(written, write(0)), "the cache of the last windows is no part of the next"
    assert not torch.equal(written, write(1))
    assert torch.equal(decode_windows(engine, first[:3], length)[:, 0], first[:3, 0])
    assert not (written[:, 1:] % 2 == 0).any()

    def likelihood(tokens):
        with torch.no_grad():
            chances = model(tokens).logits[:, :-1].masked_fill(~ordinary, -torch.inf).log_softmax(-1)
        return chances.gather(2, tokens[:, 1:, None]).mean().item()

    random = torch.Generator().manual_seed(0)
    found, wanted = likelihood(written), likelihood(continue_windows(model, first, length, ordinary, random))
    assert abs(found - wanted) < 0.15 * abs(wanted), f"{family=} {found=} {wanted=}"


def test_the_engine_tells_of_damage(tiny):
    model = load(tiny("llama"), device="cpu")
    ordinary = torch.ones(model.config.vocab_size, dtype=torch.bool)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(LutqError, match="give an undamaged model"):
        decode_windows(fast_engine(model, 2, 8, ordinary), torch.full((2, 1), 5), 8)


def test_a_model_that_the_engine_does_not_take_is_slow_with_a_warning(tiny):
    with pytest.warns(UserWarning, match="--calib own is slow"):
        assert fast_engine(load(tiny("qwen2"), device="cpu"), 2, 8, torch.ones(8, dtype=torch.bool)) is None


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
