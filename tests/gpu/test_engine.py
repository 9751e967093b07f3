"""The kernels of a decode step against lutq/decode/reference.py, and whole continuations of the engines against each other."""

import gc
import itertools
import warnings

import pytest
import torch
from conftest import FAMILIES, build_model, copy_tokenizer
from engines import continue_text

from lutq.config import LayerConfig, QuantConfig
from lutq.decode import prefill, products, reference
from lutq.decode.choose import choose, make
from lutq.decode.engine import Engine
from lutq.decode.graph import Captured
from lutq.decode.products import Sums, padded
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError
from lutq.decode.steps import FUNCTIONS, Kernels, Plan
from lutq.decode.synthetic import synthetic_model
from lutq.decode.weights import Norm, weights_of
from lutq.generate import Sampling, generate
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.quantize import quantize_checkpoint
from lutq.tokens import load_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a result, relative to its row
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def kernels():
    return Kernels(DEVICE)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def draw_sums(slabs, N, dtype, bias, seed=0):
    """An unfinished result [1, N]; what lies between two slabs is NaN."""
    memory = draw(slabs, padded(N), seed=seed)
    memory[:, N:] = torch.nan
    return Sums(memory[:, :N], draw(N, dtype=dtype, seed=seed + 100) if bias else None)


def worst(found, expected):
    """The largest relative error of a row."""
    difference = (found.double() - expected.double()).norm(dim=-1)
    return (difference / expected.double().norm(dim=-1).clamp_min(1e-30)).max().item()


# Kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [8, 576, 4096])
@pytest.mark.parametrize("learned", [False, True])
def test_embedding(kernels, dtype, K, learned):
    table, positions = draw(50, K, dtype=dtype), draw(20, K, dtype=dtype, seed=1) if learned else None
    token, position = torch.tensor([3, 49, 0, 3], device=DEVICE), torch.tensor([0, 19, 7, 8], device=DEVICE)
    found, expected = torch.empty(4, K, device=DEVICE), torch.empty(4, K, device=DEVICE)
    kernels.embed(token, position, table, positions, found)
    reference.embed(token, position, table, positions, expected)
    assert torch.equal(found, expected), f"{dtype=} {K=} {learned=}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("K", [8, 96, 576, 768, 4096, 5120, 8192, 12288, 16384])
def test_norm(kernels, dtype, centered, K):
    for M, added in ((1, True), (3, False), (16, True)):
        h, y = 3 * draw(M, K) + 2, draw(M, K, dtype=dtype, seed=1) if added else None
        bias = draw(K, dtype=dtype, seed=3) if centered else None
        by = Norm(draw(K, dtype=dtype, seed=2), bias, 1e-5, centered)
        found, expected = (
            (h.clone(), torch.empty(M, K, dtype=dtype, device=DEVICE)),
            (h.clone(), torch.empty(M, K, device=DEVICE)),
        )
        kernels.norm(found[0], y, by, found[1])
        reference.norm(expected[0], y, by, expected[1])
        about = f"{dtype=} {centered=} {M=} {K=} {added=}"
        assert torch.equal(found[0], expected[0]), f"h: {about}"
        error = worst(found[1], expected[1])
        assert error < ROUNDING[dtype], f"{about} {error=:.1e}"


SLABS = (1, 3, 4, 12, 17)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("K", [8, 96, 520, 768, 4096, 5128, 12288, 16384])
def test_norm_of_sums(kernels, dtype, centered, K):
    if not kernels.gpu.clusters:
        pytest.skip("no clusters")
    for i, slabs in enumerate(SLABS):
        h, y = 3 * draw(1, K) + 2, draw_sums(slabs, K, dtype, i % 2 == 0, seed=i)
        bias = draw(K, dtype=dtype, seed=3) if centered else None
        by = Norm(draw(K, dtype=dtype, seed=2), bias, 1e-5, centered)
        exact = h.clone(), torch.empty(1, K, device=DEVICE)
        reference.norm(exact[0], y, by, exact[1])
        results = []
        for _ in range(2):
            found = h.clone(), torch.empty(1, K, dtype=dtype, device=DEVICE)
            kernels.norm(found[0], y, by, found[1])
            results.append(found)
        about = f"{dtype=} {centered=} {K=} {slabs=}"
        assert torch.equal(results[0][1], results[1][1]), f"not repeatable: {about}"
        assert torch.equal(results[0][0], exact[0]), f"h: {about}"
        error = worst(results[0][1], exact[1])
        assert error < ROUNDING[dtype], f"{about} {error=:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_activation_of_sums(kernels, dtype, function, gated, joint):
    for i, (slabs, F) in enumerate(itertools.product(SLABS, (8, 344, 11008))):
        if joint:
            gate, up = draw_sums(slabs, 2 * F, dtype, i % 2 == 0).split([F, F], dim=1)
        else:
            gate, up = draw_sums(slabs, F, dtype, i % 2 == 0), draw_sums(slabs, F, dtype, i % 3 == 0, seed=1)
        found, expected = torch.empty(1, F, dtype=dtype, device=DEVICE), torch.empty(1, F, device=DEVICE)
        kernels.activation(function, gate, up if gated else None, found)
        reference.activation(function, gate, up if gated else None, expected)
        error = worst(found, expected)
        assert error < ROUNDING[dtype], f"{dtype=} {function=} {gated=} {joint=} {slabs=} {F=} {error=:.1e}"


def test_sums_that_the_kernels_refuse(kernels):
    def sums(slabs, N=64):
        return draw_sums(slabs, N, torch.float16, True)

    y, many = torch.empty(1, 64, dtype=torch.float16, device=DEVICE), torch.empty(2, 64, dtype=torch.float16, device=DEVICE)
    for gate, up, out in ((sums(2), sums(3), y), (sums(2), y, y), (y, sums(2), y), (sums(2), None, many)):
        with pytest.raises(RuntimeError, match="error 1"):
            kernels.activation("relu", gate, up, out)
    with pytest.raises(RuntimeError, match="error 1"):
        kernels.norm(draw(2, 64), sums(2), Norm(many[0], None, 1e-5, False), many)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activation(kernels, dtype, function, gated):
    for M, F in ((1, 8), (3, 344), (16, 11008)):
        joint = 4 * draw(M, 2 * F, dtype=dtype)
        joint[0, 0], joint[0, 1] = 300, -300
        gate, up = joint[:, :F], joint[:, F:] if gated else None
        found, expected = torch.empty(M, F, dtype=dtype, device=DEVICE), torch.empty(M, F, device=DEVICE)
        kernels.activation(function, gate, up, found)
        reference.activation(function, gate, up, expected)
        error = worst(found, expected)
        assert error < ROUNDING[dtype], f"{dtype=} {function=} {gated=} {M=} {F=} {error=:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 4096, 32001, 50272])
def test_choice(kernels, dtype, vocabulary):
    for shift in (0, 30, -30):
        logits = (draw(5, vocabulary, dtype=dtype, seed=vocabulary) + shift).contiguous()
        logits[1] = logits[1].round()  # ties
        logits[2] = -torch.inf
        logits[2, vocabulary // 2] = -3.0
        logits[3] = 0.0
        found = torch.full((5,), 9, device=DEVICE), torch.tensor([0, 5, 6, 7, 3], device=DEVICE)
        expected = tuple(tensor.clone() for tensor in found)
        kernels.choose(logits, *found, 6)
        reference.choose(logits, *expected, 6)
        assert torch.equal(found[0], expected[0]), f"{dtype=} {vocabulary=} {shift=} {found=} {expected=}"
        assert torch.equal(found[1], expected[1])


def attention_case(dtype, M, heads, kv_heads, D, capacity, rotated, seed=0):
    """Joint q, k, v; caches with NaN past the positions; positions; a rotation."""
    joint = draw(M, (heads + 2 * kv_heads) * D, dtype=dtype, seed=seed)
    q, k, v = (part.unflatten(1, (-1, D)) for part in joint.split([heads * D, kv_heads * D, kv_heads * D], 1))
    places = [capacity - 1, 0, 1, 7, 31, 32, 33, capacity // 2, 63, 64]
    position = torch.tensor([min(places[(seed + i) % len(places)], capacity - 1) for i in range(M)], device=DEVICE)
    cache = tuple(draw(M, kv_heads, capacity, D, dtype=dtype, seed=seed + i) for i in (1, 2))
    for m, t in enumerate(position.tolist()):
        for part in cache:
            part[m, :, t:] = torch.nan
    angles = torch.arange(capacity)[:, None] * 0.7 ** torch.arange(D // 2)[None]
    rotation = tuple(values.to(DEVICE) for values in (angles.cos(), angles.sin())) if rotated else None
    return q, k, v, cache, position, rotation


def check_attention(kernels, dtype, M, heads, kv_heads, D, capacity, rotated, plan, seed, sums=None):
    """sums: what replaces some of q, k and v."""
    q, k, v, cache, position, rotation = attention_case(dtype, M, heads, kv_heads, D, capacity, rotated, seed)
    q, k, v = ((sums or {}).get(name, part) for name, part in zip("qkv", (q, k, v), strict=True))
    about = f"{dtype=} {M=} {heads=} {kv_heads=} {D=} {capacity=} {rotated=} {plan=} {position.tolist()=} {[*(sums or {})]=}"
    shape = type("Sizes", (), {"own_heads": heads, "own_kv_heads": kv_heads, "head_size": D})
    work = kernels.workspace(shape, M, capacity, plan)
    expected_cache, expected = [part.clone() for part in cache], torch.empty(M, heads * D, device=DEVICE)
    reference.attention(q, k, v, expected_cache, position, rotation, D**-0.5, expected)
    results = []
    for ahead in (False, True, False):
        mine, y = [part.clone() for part in cache], torch.empty(M, heads * D, dtype=dtype, device=DEVICE)
        kernels.ahead = ahead
        kernels.attention(q, k, v, mine, position, rotation, D**-0.5, y, work)
        kernels.ahead = False
        results.append(y)
        for part, wanted in zip(mine, expected_cache, strict=True):
            same = torch.where(wanted.isnan(), part.isnan(), (part - wanted).abs() <= 2 * ROUNDING[dtype] * wanted.abs() + 1e-4)
            assert same.all(), f"the cache: {about}"
    assert torch.equal(results[0], results[1]), f"not repeatable: {about}"
    assert torch.equal(results[0], results[2]), f"not repeatable: {about}"
    assert not work.arrived.any(), f"counters: {about}"
    error = worst(results[0].view(M * heads, D), expected.view(M * heads, D))
    assert error < 1.5 * ROUNDING[dtype], f"{about} {error=:.1e}"


PLANS = ((1, 1), (2, 1), (8, 1), (4, 3), (1, 5), (8, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_attention(kernels, dtype, D, group):
    """Every head size and number of heads in a block meets every plan."""
    rows = {1: 1, 2: 2, 3: 3, 4: 4, 8: 4}[group]
    for seed, (cluster, spread) in enumerate(PLANS):
        if cluster > 1 and not kernels.gpu.clusters:
            continue
        capacity = (1, 40, 64, 130, 300, 1100)[(seed + group) % 6]
        M, kv_heads = (1, 3, 2)[seed % 3], (2, 1)[seed % 2]
        plan = Plan(rows, cluster, spread)
        check_attention(kernels, dtype, M, group * kv_heads, kv_heads, D, capacity, seed % 3 > 0, plan, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_attention_of_sums(kernels, dtype, D, group):
    """Of q, k and v alone, of all of them apart, and of one product of all."""
    for seed, (which, slabs) in enumerate(itertools.product(("q", "k", "v", "qkv", "joint"), SLABS)):
        cluster, spread = PLANS[seed % len(PLANS)]
        if cluster > 1 and not kernels.gpu.clusters:
            continue
        kv_heads, capacity = (2, 1, 3)[seed % 3], (40, 64, 130, 1, 300)[seed % 5]
        sizes = [group * kv_heads * D, kv_heads * D, kv_heads * D]
        if which == "joint":
            parts = draw_sums(slabs, sum(sizes), dtype, seed % 2 == 0, seed).split(sizes, dim=1)
        else:
            parts = [draw_sums(slabs, N, dtype, (seed + i) % 2 == 0, seed + i) for i, N in enumerate(sizes)]
        sums = {
            name: part.unflatten(1, (-1, D)) for name, part in zip("qkv", parts, strict=True) if name in which or which == "joint"
        }
        plan = Plan(group, cluster, spread)
        check_attention(kernels, dtype, 1, group * kv_heads, kv_heads, D, capacity, seed % 2 > 0, plan, seed, sums)


def test_attention_by_its_own_plan(kernels):
    for heads, kv_heads, M, capacity in (
        (32, 32, 1, 512),
        (32, 8, 1, 512),
        (64, 8, 2, 8192),
        (12, 12, 16, 300),
        (96, 96, 1, 2048),
    ):
        check_attention(kernels, torch.float16, M, heads, kv_heads, 128, capacity, True, None, 0)


def test_attention_with_few_heads_in_a_block(kernels):
    for rows in (1, 2, 4):
        check_attention(kernels, torch.float16, 2, 8, 2, 64, 200, True, Plan(rows, 1, 3), rows)


# Engines


def test_graphs_that_nobody_has_do_not_spoil_a_capture():
    """They are part of a cycle, so that only the garbage collector destroys them."""

    def dropped():
        captured = Captured(torch.cuda.current_stream, DEVICE)
        captured.itself = captured
        captured.capture()

    def function():
        if torch.cuda.is_current_stream_capturing():
            assert not gc.isenabled()
        for _ in range(10000):
            cycle = []
            cycle.append(cycle)

    for _ in range(3):
        dropped()
        Captured(function, DEVICE).capture()
        assert gc.isenabled()


SIZES = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 4096, "max_position_embeddings": 512}
SIZES |= {"num_hidden_layers": 3, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
OWN = {
    "opt": ("opt", SIZES | {"ffn_dim": 512, "word_embed_proj_dim": 256, "init_std": 0.06}),
    "llama": ("llama", SIZES | {"intermediate_size": 704, "num_key_value_heads": 2, "initializer_range": 0.06}),
    "wide": (
        "llama",
        SIZES | {"hidden_size": 640, "intermediate_size": 704, "num_key_value_heads": 4, "initializer_range": 0.04}
        | {"tie_word_embeddings": True, "attention_bias": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name, bits)`: directory of a tiny model, quantized; bits 16: as it is."""
    import conftest

    folders = {}

    def directory(name, bits):
        if (name, bits) not in folders:
            folder = tmp_path_factory.mktemp("made") / name
            if name == "embedded":
                folder = "opt-tiny"
            else:
                conftest.MODELS[f"decode-{name}"] = OWN[name]
                with torch.inference_mode(False):
                    build_model(f"decode-{name}").half().save_pretrained(folder)
                copy_tokenizer(folder)
            if bits != 16:
                out = tmp_path_factory.mktemp("quantized") / name
                with torch.inference_mode(False):
                    config = QuantConfig(bits=bits, group=128 if name in ("opt", "llama") else 64)
                    quantize_checkpoint(folder, out, config, device=DEVICE.type)
                folder = out
            folders[name, bits] = folder
        return folders[name, bits]

    return directory


CASES = [("embedded", 3), ("embedded", 16), ("opt", 2), ("llama", 3), ("llama", 16), ("wide", 4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_every_block_is_that_of_the_model(made, dtype, name, bits):
    model = load(made(name, bits), device=DEVICE, dtype=dtype)
    exact = load(made(name, bits), device="cpu", dtype="float32")
    ids = torch.randint(3, 4096, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = exact(ids, output_hidden_states=True)
    plain = model(ids.to(DEVICE), output_hidden_states=True)
    engine = Engine(weights_of(model), 64, 1, Kernels(DEVICE))
    engine.prompt(ids[:, :55].to(DEVICE))
    limit = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for t in range(55, 60):
        engine.token.copy_(ids[:, t])
        assert engine.position.tolist() == [t]
        for i, y in engine.forward():
            if i + 1 < model.config.num_hidden_layers:
                h = engine.h if y is None else engine.h + reference.finished(y)
                error = worst(h.cpu(), expected.hidden_states[i + 1][:, t])
                theirs = worst(plain.hidden_states[i + 1][:, t].cpu(), expected.hidden_states[i + 1][:, t])
                assert error < max(limit, 1.5 * theirs), f"{name=} {bits=} {dtype=} {t=} {i=} {error=:.1e} {theirs=:.1e}"
        error = worst(engine.logits.cpu(), expected.logits[:, t])
        theirs = worst(plain.logits[:, t].cpu(), expected.logits[:, t])
        assert error < max(limit, 1.5 * theirs), f"{name=} {bits=} {dtype=} {t=} {error=:.1e} {theirs=:.1e}"
        engine.choose()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("group", [64, 128])
def test_logits_by_fewer_kernels(monkeypatch, dtype, name, group):
    """Products that are left unfinished, and those that do more, give the logits of others, up to rounding that is left out."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 2560, "num_attention_heads": 20, "num_hidden_layers": 3, "vocab_size": 4096}
    if name == "opt":
        sizes |= {"ffn_dim": 5128, "word_embed_proj_dim": 2560}
    else:
        sizes |= {"intermediate_size": 5184, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
    torch.manual_seed(0)
    layer, gpu = LayerConfig(3, group, "bcq", False), Kernels(DEVICE).gpu
    model = synthetic_model(AutoConfig.for_model(name, **sizes), layer, DEVICE, dtype)
    ids = torch.randint(3, 4096, (1, 40), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    results = []
    for fewer in (True, False):
        if not fewer:
            monkeypatch.setattr(products.Packed, "slabs", lambda *about: 0)
            monkeypatch.setattr(products.Packed, "fuses", lambda *about: False)
        engine = Engine(weights_of(model), 64, 1, Kernels(DEVICE))
        sums = {isinstance(result, Sums) for at in engine.places for result in (*at.inward, at.out, *at.up, at.down)}
        fused = {fusion is not None for fusions in engine.fusions for fusion in fusions}
        assert sums == {fewer and gpu.clusters and not (gpu.fused and group == 128)}
        assert fused == {fewer and gpu.fused and group == 128}
        engine.capture()
        engine.prompt(ids[:, :30])
        logits = []
        for t in range(30, 40):
            engine.token.copy_(ids[:, t])
            engine.advance()
            logits.append(engine.logits.clone())
        results.append(torch.cat(logits))
    error = worst(*results)
    assert error < {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype], f"{dtype=} {name=} {error=:.1e}"


@pytest.mark.parametrize(("name", "bits"), CASES)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_back_to_back_is_one_by_one(made, name, bits, batch):
    """The same bits whether kernels overlap, are replayed as a graph, or wait for each other."""
    model = load(made(name, bits), device=DEVICE, dtype="float16")
    ids = torch.randint(3, 4096, (batch, 50), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))

    class Waiting(Kernels):
        def __getattribute__(self, name):
            torch.cuda.synchronize()
            return super().__getattribute__(name)

    results = []
    for functions, captured in ((Waiting(DEVICE), False), (Kernels(DEVICE), False), (Kernels(DEVICE), True)):
        engine = Engine(weights_of(model), 128, batch, functions)
        if captured:
            engine.capture()
        engine.prompt(ids)
        tokens = [engine.token.clone()]
        for _ in range(40):
            engine.advance()
            tokens.append(engine.token.clone())
        results.append((torch.stack(tokens), engine.logits.clone(), engine.cache[:, :, :, :, :90].clone()))
    for found in results[1:]:
        for one, other in zip(results[0], found, strict=True):
            assert torch.equal(one, other), f"{name=} {bits=} {batch=}"


def gap(model, ids, found, expected):
    """0 for the same tokens; else by how many standard deviations the logits of the first different ones are apart."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            before = torch.cat([ids[0], torch.tensor(expected[:i], dtype=torch.int64, device=ids.device)])
            logits = model(before[None]).logits[0, -1].float()
            return ((logits[other] - logits[one]).abs() / logits.std()).item()
    return 0.0


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_greedy_tokens_of_long_texts(made, name, bits):
    """The same tokens, but where rounding decides between two that are as likely."""
    model = load(made(name, bits), device=DEVICE, dtype="float16")
    gaps = []
    for seed in range(3):
        ids = torch.randint(3, 4096, (1, 20), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        expected = model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=False)[0, 20:].tolist()
        for engine in ("graph", "fast"):
            found = []
            # transformers keeps the end token from coming, which the others must not choose either
            continue_text(make(engine, model, 220, GREEDY), ids, 200, (), found.append)
            cut = next((i for i, token in enumerate(found) if token == 2), 200)
            gaps.append((gap(model, ids, found[:cut], expected[:cut]), engine, seed))
    assert max(gaps)[0] < 0.03, f"{name=} {bits=} {gaps=}"


@pytest.mark.parametrize(("name", "bits"), [("embedded", 3), ("embedded", 16), ("llama", 3)])
def test_greedy_texts_of_all_engines(made, name, bits):
    tokenizer = load_tokenizer(made("llama", 16))
    model = load(made(name, bits), device=DEVICE, dtype="float16")
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    for prompt in ("The old man walked slowly to the house, and", "In 1987 ,"):
        texts = {engine: generate(model, tokenizer, prompt, sampling, engine=engine) for engine in ("plain", "graph", "fast")}
        assert [result.engine for result in texts.values()] == list(texts)
        for engine in ("graph", "fast"):
            assert texts[engine].text == texts["plain"].text, f"{name=} {bits=} {engine=} {prompt=}"
    auto = generate(model, tokenizer, "In 1987 ,", sampling)
    assert auto.engine == "fast"
    assert auto.summary().endswith(f"backend {'torch' if bits == 16 else 'cuda'}, engine fast"), auto.summary()


def test_the_whole_context_without_drift(made):
    """Logits of the fast engine, fed with the model's own tokens up to the end of the context, stay near the model's."""
    model = load(made("llama", 3), device=DEVICE, dtype="float16")
    ids = torch.randint(3, 4096, (1, 512), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = model(ids).logits[0]
    engine = Engine(weights_of(model), 512, 1, Kernels(DEVICE))
    engine.capture()
    engine.prompt(ids[:, :20])
    errors = []
    for t in range(20, 512):
        engine.token.copy_(ids[:, t])
        engine.position.fill_(t)
        engine.advance()
        errors.append(worst(engine.logits, expected[t : t + 1]))
    assert max(errors) < 1e-2, f"{max(errors)=:.1e} at {errors.index(max(errors)) + 20}"
    assert sum(errors[-50:]) < 2 * sum(errors[:50]) + 1e-3, "it drifts"


def test_prompts_in_chunks(made, monkeypatch):
    model = load(made("llama", 3), device=DEVICE, dtype="float16")
    ids = torch.randint(3, 4096, (1, 300), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = model(ids).logits[:, -1]
    for chunk in (7, 100, 1000):
        monkeypatch.setattr(prefill, "CHUNK", chunk)
        engine = Engine(weights_of(model), 310, 1, Kernels(DEVICE))
        engine.prompt(ids)
        assert worst(engine.logits, expected) < 1e-2, f"{chunk=}"


def test_steps_allocate_nothing_and_weights_are_not_copied(made):
    model = load(made("llama", 3), device=DEVICE, dtype="float16")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = sum(m.kernel_codes.nbytes for m in model.modules() if isinstance(m, LutLinear))
    weights = weights_of(model)
    storages = [m.kernel_codes.untyped_storage() for m in model.modules() if isinstance(m, LutLinear)]
    assert sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) == held, "weights are held twice"
    engine = Engine(weights, 128, 1, Kernels(DEVICE))
    engine.capture()
    engine.prompt(torch.arange(3, 20, device=DEVICE)[None])
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        engine.advance()
    assert torch.cuda.memory_allocated() == before
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_graph_engine_is_the_plain_loop(tiny, name):
    model = load(tiny(name), device=DEVICE, dtype="float32")
    ids = torch.randint(3, 4096, (1, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    engine = make("graph", model, 60, GREEDY)
    for _ in range(2):
        found, wanted = [], ids
        continue_text(engine, ids, 40, (), found.append)
        for _ in range(40):
            wanted = torch.cat([wanted, model(wanted, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert found == wanted[0, 11:].tolist(), f"{name=}"


def test_a_model_that_cannot_be_captured_falls_back_loudly(tiny):
    model = load(tiny("llama"), device=DEVICE, dtype="float32")
    forward = model.forward

    def waiting(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits.sum().item()
        return result

    waiting.__signature__ = __import__("inspect").signature(forward)
    model.forward = waiting
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose("auto", model, 20, GREEDY) is None
    texts = [str(warning.message) for warning in caught if "engine" in str(warning.message)]
    assert len(texts) == 2, texts
    assert "fast does not take this model" in texts[0], texts
    assert "lutq decodes with --engine plain: graph does not take this model" in texts[1], texts
    with pytest.raises(RefusedError):
        make("graph", model, 20, GREEDY)
    assert torch.ones(3, device=DEVICE).sum().item() == 3, "the GPU still works"
    assert torch.rand(100, device=DEVICE).unique().numel() > 90, "and draws numbers"


@pytest.mark.parametrize("engine", ["fast", "graph"])
def test_sampling(made, engine):
    folder = made("embedded", 3)
    tokenizer = load_tokenizer(folder)
    model = load(folder, device=DEVICE, dtype="float16")

    def text(**options):
        return generate(model, tokenizer, "The old man walked", Sampling(max_new_tokens=16, **options), engine=engine).text

    greedy = text(temperature=0.0)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4, "top_k": 0, "top_p": 1.0}):
        assert text(seed=3, **options) == greedy, f"{options=}"
    for options in ({}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}, {"repetition_penalty": 1.2}):
        texts = [text(seed=seed, **options) for seed in range(3)]
        assert texts == [text(seed=seed, **options) for seed in range(3)], f"not repeatable: {options=}"
        assert len(set(texts)) == 3, f"{options=} {texts=}"


def test_captured_draws_have_the_right_frequencies():
    sampler = Sampler(Sampling(temperature=1.0, top_k=4, top_p=1.0), 8, 64, DEVICE)
    logits = draw(1, 8).expand(64, -1).contiguous()
    sampler(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler(logits)
    counts = torch.zeros(8, device=DEVICE)
    torch.manual_seed(0)
    for _ in range(200):
        graph.replay()
        counts += tokens.bincount(minlength=8)
    top, places = logits[0].topk(4)
    expected = torch.zeros(8, device=DEVICE).scatter(0, places, top.softmax(-1))
    assert (counts / counts.sum() - expected).abs().max() < 0.02, f"{counts=} {expected=}"


def test_an_interrupted_loop_leaves_the_gpu_clean(made):
    model = load(made("llama", 3), device=DEVICE, dtype="float16")
    ids = torch.arange(3, 20, device=DEVICE)[None]
    engine = make("fast", model, 100, GREEDY)
    expected = []
    continue_text(engine, ids, 30, (), expected.append)
    for stop in range(3):
        count = itertools.count()

        def interrupt(token, stop=stop, count=count):
            if next(count) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            continue_text(engine, ids, 30, (), interrupt)
        found = []
        continue_text(engine, ids, 30, (), found.append)
        assert found == expected
