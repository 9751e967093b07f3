"""Generated text is that of a plain loop, comes in pieces as it is made, and stops where it must."""

import shutil

import pytest
import torch
from conftest import CPU_BACKEND
from transformers import AutoTokenizer

from lutq.errors import LutqError
from lutq.generate import Sampling, encode, generate, generate_many
from lutq.hf import load

PROMPT = "The old man walked slowly to the house, and"
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def model(embedded):
    return load(embedded, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return AutoTokenizer.from_pretrained(embedded)


@torch.inference_mode()
def argmax_loop(model, ids, count):
    """Greedy continuation of ids [1, T] without a cache: a list of new token ids, the end token included."""
    start = ids.shape[1]
    while ids.shape[1] < start + count:
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("prompt", [PROMPT, "In 1987 ,", "“It was”, she said: ¿no?", "\n\n= = ", "  leading blanks"])
def test_greedy_is_argmax(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = argmax_loop(model, ids, 20)
    result = generate(model, tokenizer, prompt, Sampling(max_new_tokens=20, **GREEDY))
    assert result.text == tokenizer.decode(expected, skip_special_tokens=True), f"{prompt=} {result.text=}"
    assert (result.prompt_tokens, result.new_tokens) == (ids.shape[1], len(expected)), f"{prompt=} {result}"


def test_sampling_among_one_is_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=10, **GREEDY))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4, "top_k": 0, "top_p": 1.0}):
        sampled = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=10, seed=5, **options))
        assert sampled.text == greedy.text, f"{options=} {sampled.text=} {greedy.text=}"


def test_seed(model, tokenizer):
    texts = {seed: generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=12, seed=seed)).text for seed in (0, 1, 2)}
    again = {seed: generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=12, seed=seed)).text for seed in (2, 1, 0)}
    assert texts == again, f"{texts=} {again=}"
    assert len(set(texts.values())) == 3, f"{texts=}"


def test_repetition_penalty(model, tokenizer):
    plain = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=40, **GREEDY)).text
    varied = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=40, repetition_penalty=1.5, **GREEDY)).text
    words = [len(set(tokenizer(text).input_ids)) for text in (plain, varied)]
    assert words[1] > words[0], f"{plain=} {varied=}"


def test_streaming(model, tokenizer):
    pieces = []
    result = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=40), write=pieces.append)
    assert "".join(pieces) == result.text, f"{pieces=} {result.text=}"
    assert len([piece for piece in pieces if piece]) > 10, f"not streamed: {pieces=}"
    assert result.prompt_seconds > 0, f"{result}"
    assert result.decode_seconds > 0, f"{result}"
    assert f"prompt {result.prompt_tokens} tokens" in result.summary(), f"{result.summary()}"
    assert f"decode {result.new_tokens} tokens" in result.summary(), f"{result.summary()}"
    assert result.summary().endswith(f"; backend {result.backend}"), f"{result.summary()}"
    assert result.backend in (CPU_BACKEND, "torch"), f"{result.backend=}"


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens(model, tokenizer, count):
    result = generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=count))
    assert result.new_tokens == count, f"{count=} {result}"
    assert ("decode" in result.summary()) == (count > 1), f"{count=} {result.summary()}"


def prompt_of(tokenizer, count):
    """A prompt of exactly `count` tokens, </s> included."""
    words = " the" * (count - 1)
    assert tokenizer(words, return_tensors="pt").input_ids.shape == (1, count), f"{count=}"
    return words


@pytest.mark.parametrize("room", [1, 3])
def test_stops_at_the_end_of_the_context(model, tokenizer, room):
    result = generate(model, tokenizer, prompt_of(tokenizer, 1024 - room), Sampling(max_new_tokens=50, **GREEDY))
    assert (result.prompt_tokens, result.new_tokens) == (1024 - room, room), f"{room=} {result}"


@pytest.mark.parametrize("count", [1024, 1025, 2000])
def test_prompt_too_long(model, tokenizer, count):
    with pytest.raises(LutqError, match=f"the prompt has {count} tokens and the model takes 1024: shorten the prompt"):
        generate(model, tokenizer, prompt_of(tokenizer, count))


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_empty_prompt(model, tokenizer, prompt):
    with pytest.raises(LutqError, match="the prompt is empty"):
        generate(model, tokenizer, prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
    ids=str,
)
def test_bad_sampling(options):
    with pytest.raises(LutqError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_of_torch_work(model, tokenizer, seed):
    assert generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=2, seed=seed)).new_tokens == 2, f"{seed=}"


@pytest.mark.parametrize("seed", [2**64, -1])
def test_seed_out_of_range(model, tokenizer, seed):
    with pytest.raises(LutqError, match="seed"):
        generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=2, seed=seed))


TEMPLATE = """
{%- for m in messages %}[{{ m['role'] }}] {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture(scope="module")
def chat_directory(embedded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(embedded, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_chat(model, chat_directory):
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    ids = tokenizer("[user] Who goes there?\n[assistant]", return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.equal(encode(tokenizer, "Who goes there?", chat=True), ids), "the template is not used as it is"
    expected = tokenizer.decode(argmax_loop(model, ids, 20), skip_special_tokens=True)
    result = generate(model, tokenizer, "Who goes there?", Sampling(max_new_tokens=20, **GREEDY), chat=True)
    assert result.text == expected, f"{result.text=} {expected=}"
    assert result.text != generate(model, tokenizer, "Who goes there?", Sampling(max_new_tokens=20, **GREEDY)).text


def test_chat_without_template(model, tokenizer):
    with pytest.raises(LutqError, match="has no chat template: leave out --chat"):
        generate(model, tokenizer, PROMPT, chat=True)


# The same through the command line

FLAGS = ("--max-new-tokens", "12", "--temperature", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def continuation(model, tokenizer):
    return generate(model, tokenizer, PROMPT, Sampling(max_new_tokens=12, **GREEDY)).text


@pytest.mark.parametrize("way", ["argument", "file", "standard input", "dash", "file with final newline"])
def test_ways_to_give_the_prompt(embedded, lutq_command, tmp_path, continuation, way):
    (tmp_path / "prompt.txt").write_text(PROMPT + ("\n" if way.endswith("newline") else ""), encoding="utf-8")
    args = {"argument": [PROMPT], "standard input": [], "dash": ["-"]}.get(way, ["--file", "prompt.txt"])
    stdin = f"{PROMPT}\n" if way in ("standard input", "dash") else "not this"
    result = lutq_command("generate", *args, "--model", embedded, *FLAGS, stdin=stdin)
    assert result.returncode == 0, f"{way=} {result.stderr}"
    assert result.stdout == PROMPT + continuation + "\n", f"{way=} {result.stdout=}"
    assert result.stderr.count("\n") == 1, f"{way=} {result.stderr=}"
    assert "decode 12 tokens" in result.stderr, f"{way=} {result.stderr=}"


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"caf\xe9", "both"], ids=str)
def test_bad_prompt_files(embedded, lutq_command, tmp_path, content):
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(b"text" if content == "both" else content)
    result = lutq_command(
        "generate", *([PROMPT] if content == "both" else []), "--file", "prompt.txt", "--model", embedded, *FLAGS
    )
    assert result.returncode == 2, f"{content=} {result}"
    assert result.stderr.startswith("lutq: "), f"{content=} {result.stderr}"
    assert result.stderr.count("\n") == 1, f"{content=} {result.stderr}"
    assert "dataset" not in result.stderr, f"{content=}: a prompt is no dataset: {result.stderr}"


def test_chat_through_the_command_line(chat_directory, lutq_command):
    result = lutq_command("generate", "Who goes there?", "--chat", "--model", chat_directory, *FLAGS)
    assert result.returncode == 0, result.stderr
    assert "Who goes there?" not in result.stdout, f"the answer alone is wanted: {result.stdout}"
    assert result.stdout.strip(), f"{result.stdout=}"


# Several prompts

PROMPTS = [" ".join(PROMPT.split()[: 1 + i % 9]) for i in range(18)]  # more than an engine takes at a time, of many lengths


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_several_prompts(model, tokenizer, engine, penalty):
    sampling = Sampling(max_new_tokens=9, repetition_penalty=penalty, **GREEDY)
    for count in (0, 1, 2, 18) if engine == "fast" else (0, 2):
        ready = []
        found = generate_many(
            model, tokenizer, PROMPTS[:count], sampling, engine=engine, ready=lambda ready=ready: ready.append(1)
        )
        assert len(found) == count
        assert len(ready) == min(count, 1)
        for prompt, result in zip(PROMPTS, found, strict=False):
            alone = generate(model, tokenizer, prompt, sampling)
            assert result.text == alone.text, f"{engine=} {penalty=} {count=} {prompt=} {result.text=} {alone.text=}"
            assert (result.prompt_tokens, result.new_tokens) == (alone.prompt_tokens, alone.new_tokens), f"{prompt=} {result}"
            assert result.engine == engine
            assert result.prompt_seconds > 0


@pytest.mark.parametrize("engine", ["fast", "graph", "plain"])
def test_several_random_texts(model, tokenizer, engine):
    def texts(seed, prompts=PROMPTS[:4]):
        return [r.text for r in generate_many(model, tokenizer, prompts, Sampling(max_new_tokens=9, seed=seed), engine=engine)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert len(set(texts(0, [PROMPT] * 6))) > 1, "every text is drawn for itself"
    assert texts(0)[:1] == texts(0, PROMPTS[:1]) or engine == "fast", "the first text is that of a prompt alone"


@pytest.mark.parametrize(("engine", "together"), [("fast", 16), ("plain", 1)])
def test_results_of_several_come_when_they_are_there(model, tokenizer, engine, together):
    """In order, and before the prompts after those that are continued together."""
    prompts, events = PROMPTS[:3] if engine == "plain" else PROMPTS, []
    found = generate_many(
        model,
        tokenizer,
        prompts,
        Sampling(max_new_tokens=2, **GREEDY),
        engine=engine,
        done=lambda prompt, result: events.append((prompt, result)),
        write=lambda text: events.append(text) if text else None,
    )
    told = [event for event in events if isinstance(event, tuple)]
    assert told == list(zip(prompts, found, strict=True))
    first = events.index(told[0])
    later = "".join(event for event in events[first:] if isinstance(event, str))
    assert sorted(later) == sorted("".join(result.text for result in found[together:])), f"{events=}"


def test_several_texts_end_each_at_its_own_end(model, tokenizer, monkeypatch):
    """At a stop token, or where the model takes no more."""
    sampling = Sampling(max_new_tokens=12, **GREEDY)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS[:4]]
    expected = [argmax_loop(model, row, 12) for row in ids]
    stop = expected[2][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    found = generate_many(model, tokenizer, PROMPTS[:4], sampling, engine="fast")
    counts = [tokens.index(stop) + 1 if stop in tokens else 12 for tokens in expected]
    assert [result.new_tokens for result in found] == counts
    assert min(counts) < 12
    monkeypatch.undo()
    monkeypatch.setattr(model.config, "max_position_embeddings", ids[3].shape[1] + 5)
    found = generate_many(model, tokenizer, PROMPTS[:4], sampling, engine="fast")
    counts = [min(12, ids[3].shape[1] + 5 - row.shape[1]) for row in ids]
    assert [result.new_tokens for result in found] == counts
    for result, tokens, count in zip(found, expected, counts, strict=True):
        assert result.text == tokenizer.decode(tokens[:count], skip_special_tokens=True), f"{count=}"


def test_a_prompt_among_several_that_is_too_long(model, tokenizer):
    with pytest.raises(LutqError, match=r"the prompt has \d+ tokens and the model takes 1024: shorten the prompt"):
        generate_many(
            model, tokenizer, [PROMPT, "house " * 1500], engine="fast", ready=lambda: pytest.fail("nothing was to be made")
        )
    with pytest.raises(LutqError, match="the prompt is empty"):
        generate_many(model, tokenizer, [PROMPT, " "], engine="fast")
