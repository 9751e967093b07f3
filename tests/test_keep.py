"""The engine that stays with a model: taken again where a new one would be the same, made anew or freed where not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import OPT_TINY, build_model

from lutq.decode import keep
from lutq.decode.keep import NAME, engine_for, forget
from lutq.errors import LutqError
from lutq.generate import Sampling, generate, generate_many
from lutq.hf import load
from lutq.parallel.ranks import ALONE
from lutq.tokens import load_tokenizer

GREEDY = Sampling(temperature=0.0)
PROMPT = "The old man walked"


def new_model():
    with torch.inference_mode(False):  # where torch counts how often weights are written
        return build_model("llama")


@pytest.fixture
def model():
    return new_model()


@pytest.fixture
def made(monkeypatch):
    """Names of the engines that were made."""
    names, choose = [], keep.choose
    monkeypatch.setattr(keep, "choose", lambda name, *rest: names.append(name) or choose(name, *rest))
    return names


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def use(model, requested="fast", capacity=40, settings=GREEDY, longest=4096):
    with engine_for(requested, model, capacity, longest, settings) as engine:
        return engine


@pytest.mark.parametrize("name", ["fast", "graph"])
def test_an_engine_is_taken_again(model, made, name):
    first = use(model, name)
    assert first.capacity == (128 if name == "fast" else 256), "rounded up, by the fast engine to the model's maximum at most"
    assert use(model, name, 200) is first
    assert use(model, name, settings=Sampling(temperature=0.0, max_new_tokens=3, seed=9)) is first
    assert made == [name]
    assert use(model, name, 300) is not first
    assert made == [name] * 2


def test_the_longest_context_is_not_exceeded(model):
    assert use(model, "graph", 100, longest=128).capacity == 128
    assert use(model, "graph", 100, longest=None).capacity == 256


@pytest.mark.parametrize(
    "other",
    [{"requested": "graph"}, {"settings": Sampling(temperature=0.5)}, {"settings": Sampling(temperature=0.0, top_k=1)}],
    ids=str,
)
def test_another_purpose_is_another_engine(model, other):
    first = weakref.ref(use(model))
    second = use(model, **other)
    assert first() is None, "freed at once, without the garbage collector"
    assert use(model, **other) is second
    assert use(model) is not second


def written(model):
    model.model.norm.weight.mul_(2)


def replaced(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def cast(model):
    model.double()


@pytest.mark.parametrize("change", [written, replaced, cast])
def test_other_weights_are_another_engine(model, change):
    first = use(model)
    with torch.inference_mode(False), torch.no_grad():
        change(model)
    second = use(model)
    assert second is not first
    assert use(model) is second


def test_nothing_is_kept_of_plain_and_none(model, made):
    first = use(model)
    assert use(model, "plain") is None
    assert use(model) is first, "plain leaves it alone"
    forget(model)
    assert use(model, "auto") is None, "on the CPU"
    assert NAME not in model.__dict__
    assert made == ["fast", "plain", "auto"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_frees_it(model, error):
    first = weakref.ref(use(model))
    with pytest.raises(error), engine_for("fast", model, 40, 4096, GREEDY):
        raise error
    assert first() is None
    assert NAME not in model.__dict__


def test_a_part_of_a_model_keeps_none(model, made):
    model.ranks = ALONE
    first = weakref.ref(use(model))
    assert first() is None
    assert NAME not in model.__dict__
    with pytest.raises(LutqError):
        use(model, "plain")


def test_in_use_it_is_nobody_elses(model):
    with engine_for("fast", model, 40, 4096, GREEDY) as one, engine_for("fast", model, 40, 4096, GREEDY) as two:
        assert one is not two
    assert use(model) is one


def test_it_goes_with_its_model_and_not_with_copies():
    model = new_model()
    engine = weakref.ref(use(model))
    other = copy.deepcopy(model)
    assert use(other) is not engine()
    assert pickle.loads(pickle.dumps(model.__dict__[NAME])).engine is None
    forget(other)
    forget(other)
    del model
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("name", ["fast", "graph"])
def test_texts_do_not_depend_on_earlier_ones(made, name):
    tokenizer = load_tokenizer(OPT_TINY)
    model = load(OPT_TINY, device="cpu", dtype="float32")

    def text(prompt, count, **options):
        return generate(model, tokenizer, prompt, Sampling(max_new_tokens=count, **options), engine=name).text

    cases = [(PROMPT, 12, {"temperature": 0.0}), ("In 1987 , the", 20, {"temperature": 0.0}), (PROMPT, 12, {"seed": 3})]
    alone = []
    for prompt, count, options in cases:
        forget(model)
        alone.append(text(prompt, count, **options))
    made.clear()
    for _ in range(2):
        assert [text(prompt, count, **options) for prompt, count, options in cases] == alone
    assert len(made) == 4, "the two greedy texts share one"
    with pytest.raises(LutqError, match="the prompt is empty"):
        text("", 3)


@pytest.mark.parametrize("name", ["fast", "graph"])
def test_several_prompts_make_one_engine(made, name):
    model, prompts = load(OPT_TINY, device="cpu", dtype="float32"), [PROMPT[:i] for i in range(1, 19)]
    for _ in range(2):
        generate_many(model, load_tokenizer(OPT_TINY), prompts, Sampling(temperature=0.0, max_new_tokens=2), engine=name)
    assert made == [name]
