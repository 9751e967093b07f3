"""The engines compute what the transformers model does: hidden states block by block, logits, and whole greedy continuations.

Here they run uncaptured on the CPU, the fast one over lutq/decode/reference.py; tests/gpu/test_engine.py tests the kernels.
"""

import copy
import itertools
import warnings

import pytest
import torch
from conftest import CPU_BACKEND, FAMILIES, LLAMA, MODELS, build_model
from engines import continue_text
from torch.utils._python_dispatch import TorchDispatchMode

from lutq.config import LayerConfig
from lutq.cuda import prepack
from lutq.decode import engine as engine_module
from lutq.decode import prefill, products, reference
from lutq.decode.choose import choose, make
from lutq.decode.engine import Engine
from lutq.decode.general import General
from lutq.decode.products import Dense, Packed, Parts, Sums, adjacent, common_slabs, join, padded, place
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError, rotation_of, shape_of
from lutq.decode.weights import Norm, weights_of
from lutq.errors import LutqError
from lutq.generate import Sampling, generate
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.tokens import load_tokenizer

FAST = ("opt", "llama", "llama-tied")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def small(embedded):
    """`small(name)`: a tiny model in fp32, or the embedded one, quantized."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = load(embedded, device="cpu", dtype="float32") if name == "quantized" else build_model(name)
        return made[name]

    return model


def prompt_ids(model, count, seed=0, batch=1):
    return torch.randint(3, model.config.vocab_size, (batch, count), generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def greedy(model, ids, count):
    """New token ids of a plain loop without a cache."""
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


# The fast engine


@pytest.mark.parametrize("name", [*FAST, "quantized"])
def test_every_block_is_that_of_the_model(small, name):
    model = small(name)
    ids = prompt_ids(model, 12)
    expected = model(ids, output_hidden_states=True)
    engine = Engine(weights_of(model), 20)
    engine.prompt(ids[:, :9])
    assert relative(engine.logits, expected.logits[:, 8]) < 1e-5, f"{name=}: the prompt"
    for t in range(9, 12):
        engine.token.copy_(ids[:, t])
        assert engine.position.tolist() == [t], f"{name=} {t=}"
        for i, y in engine.forward():
            if i + 1 < model.config.num_hidden_layers:  # the last of transformers' states is normalized
                error = relative(engine.h + y, expected.hidden_states[i + 1][:, t])
                assert error < 1e-5, f"{name=} {t=} {i=} {error=}"
        assert relative(engine.logits, expected.logits[:, t]) < 1e-5, f"{name=} {t=}"
        engine.choose()
        assert engine.token.item() == expected.logits[0, t].argmax(), f"{name=} {t=}"


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("chunk", [1, 5, 9, 100])
def test_prompts_in_chunks(small, monkeypatch, name, chunk):
    monkeypatch.setattr(prefill, "CHUNK", chunk)
    model = small(name)
    ids = prompt_ids(model, 23)
    engine = Engine(weights_of(model), 30)
    engine.prompt(ids)
    assert relative(engine.logits, model(ids).logits[:, -1]) < 1e-5, f"{name=} {chunk=}"
    assert engine.position.tolist() == [23]


@pytest.mark.parametrize("name", FAST)
def test_sequences_of_a_batch_have_their_own_positions(small, name):
    model = small(name)
    prompts = [prompt_ids(model, count, seed=count)[0] for count in (3, 17, 8)]
    engine = Engine(weights_of(model), 40, batch=3)
    for i, row in enumerate(prompts):
        prefill.prefill(engine, i, row)
    engine.choose()
    found = [engine.token.tolist()]
    for _ in range(9):
        engine.step()
        found.append(engine.token.tolist())
    for i, row in enumerate(prompts):
        assert [tokens[i] for tokens in found] == greedy(model, row[None], 10), f"{name=} {i=}"


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_whole_context(small, name):
    model = small(name)
    ids = prompt_ids(model, 4)
    engine = Engine(weights_of(model), 1000)
    assert engine.capacity == model.config.max_position_embeddings == 128
    found = []
    continue_text(engine, ids, 124, (), found.append)
    expected = greedy(model, ids, 124)
    same = [a == b for a, b in zip(found, expected, strict=True)]
    assert all(same), f"{name=}: another token at {same.index(False)}"
    assert engine.position.item() == 127, "it stays at the end of the cache"


def test_a_second_prompt_starts_anew(small):
    model = small("llama")
    engine = Engine(weights_of(model), 64)
    for seed in (1, 2):
        ids, found = prompt_ids(model, 10 * seed, seed), []
        continue_text(engine, ids, 8, (), found.append)
        assert found == greedy(model, ids, 8), f"{seed=}"


ROTATIONS = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("rope", ROTATIONS, ids=lambda rope: rope["rope_type"])
def test_rotations(rope):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **LLAMA | {"rope_parameters": rope, "attention_bias": True, "mlp_bias": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = prompt_ids(model, 100)
    engine = Engine(weights_of(model), 110)
    engine.prompt(ids[:, :99])
    engine.token.copy_(ids[:, 99])
    engine.step()
    assert relative(engine.logits, model(ids).logits[:, -1]) < 1e-5, f"{rope=}"


def test_rotation_has_half_the_columns():
    cosine, sine = rotation_of(build_model("llama").config, 10, torch.device("cpu"))
    assert cosine.shape == sine.shape == (10, 8)
    assert torch.equal(cosine[0], torch.ones(8))
    assert cosine.is_contiguous()


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "after its blocks"),
        ("opt", {"word_embed_proj_dim": 72}, "projects its embeddings"),
        ("opt", {"_remove_final_layer_norm": True}, "lacks some of its norms"),
        ("opt", {"activation_function": "tanh"}, "no activation 'tanh'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "length of the text"),
        ("mistral", {}, "model type 'mistral'"),
    ],
)
def test_what_the_fast_engine_does_not_take(kind, fields, reason):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **fields)
    with pytest.raises(RefusedError, match=f"the fast engine does not take this model: .*{reason}.*; use --engine graph"):
        shape_of(config)


def test_ranks_share_heads_and_features(small):
    config = small("llama").config
    shape = shape_of(config, world=2)
    assert (shape.own_heads, shape.own_kv_heads, shape.own_inner) == (3, 1, 86)
    with pytest.raises(LutqError, match="2 kv_heads cannot be shared by 3 ranks"):
        shape_of(config, world=3)


def test_a_cache_that_does_not_fit(small, monkeypatch):
    monkeypatch.setattr("lutq.decode.engine.free_memory", lambda device: 60_000)
    message = r"the cache of 1 x 128 tokens takes 65.54 kB and cpu has 60.00 kB free: about 111 tokens would fit"
    with pytest.raises(LutqError, match=message):
        Engine(weights_of(small("llama")), 128)


# Products


def kernel_order(N, K, layer, seed, bias=False):
    """A layer in kernel order on the CPU, where it could not be multiplied."""
    from conftest import random_packed

    vector = torch.randn(N, generator=torch.Generator().manual_seed(seed)) if bias else None
    module = LutLinear.from_packed(random_packed(N, K, layer, seed), K, layer, vector)
    module.kernel_codes, module.kernel_records, module.wide = prepack(module.packed(), layer)
    for name in ("codes", "scales", "offsets", "zero_points"):
        module._buffers[name] = None
    return module


@pytest.mark.parametrize("layer", [LayerConfig(3, 128, "bcq", True), LayerConfig(4, 64, "uniform", True)])
@pytest.mark.parametrize("sizes", [(128, 64, 64), (64, 33), (256,)])
def test_joined_layers_share_memory_and_keep_their_state(layer, sizes):
    modules = [kernel_order(N, 300, layer, i, bias=i != 1) for i, N in enumerate(sizes)]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    (joint,) = join(modules)
    whole = prepack(products_of(modules, layer), layer)
    assert torch.equal(joint.ready.codes, whole.codes), "the joint layer is not that of the rows one after the other"
    assert torch.equal(joint.ready.records, whole.records)
    assert (joint.N, joint.K, joint.layer) == (sum(sizes), 300, layer)
    assert torch.equal(joint.bias[: sizes[0]], modules[0].bias)
    for module, state in zip(modules, before, strict=True):
        assert module.kernel_codes.untyped_storage().data_ptr() == joint.ready.codes.untyped_storage().data_ptr()
        after = module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
        assert after.keys() == state.keys()
    (again,) = join(modules)
    assert again.ready.codes.data_ptr() == joint.ready.codes.data_ptr(), "joined again, they are copied"


def products_of(modules, layer):
    """The canonical tensors of layers one after the other."""
    from lutq.pack import Packed as Canonical

    parts = [module.packed() for module in modules]
    rows = {"codes": 1, "scales": 1, "offsets": 0, "zero_points": 0}
    tensors = {name: [getattr(part, name) for part in parts] for name in rows}
    return Canonical(*(None if some[0] is None else torch.cat(some, rows[name]) for name, some in tensors.items()))


def test_layers_that_do_not_fit_together_stay_apart():
    one, two = LayerConfig(3, 128, "bcq", True), LayerConfig(2, 128, "bcq", True)
    for modules in (
        [kernel_order(64, 256, one, 0), kernel_order(64, 256, two, 1)],
        [kernel_order(33, 256, one, 0), kernel_order(64, 256, one, 1)],
        [kernel_order(64, 256, one, 0), torch.nn.Linear(256, 64)],
    ):
        found = join(modules)
        assert [product.N for product in found] == [module.out_features for module in modules]
        assert isinstance(found[0], Packed)


def test_joined_linear_layers(small, tmp_path):
    model = build_model("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = weights_of(model)
    attention = model.model.layers[0].self_attn
    (joint,) = weights.layers[0].inward.products
    assert isinstance(joint, Dense)
    assert attention.k_proj.weight.data_ptr() == joint.weight[96:].data_ptr(), "weights are held twice"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    again = weights_of(model).layers[0].inward.products[0]
    assert again.weight.data_ptr() == joint.weight.data_ptr(), "joined again, they are copied"


def test_adjacent_tensors_are_not_copied():
    whole = torch.arange(24).view(6, 4)
    parts = [whole[:1], whole[1:4], whole[4:]]
    assert adjacent(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(adjacent(parts), whole)
    assert torch.equal(adjacent(parts[1:]), whole[1:])
    for others in (parts[::-1], [parts[0], parts[2]], [parts[0], parts[1].clone()]):
        assert torch.equal(adjacent(others), torch.cat(others))
        assert adjacent(others).data_ptr() != others[0].data_ptr()


@pytest.mark.parametrize("apart", [False, True])
def test_parts_lie_one_after_the_other(monkeypatch, apart):
    torch.manual_seed(0)
    modules = [torch.nn.Linear(16, N) for N in (8, 24, 16)]
    if apart:
        monkeypatch.setattr(products, "join", lambda modules: [products.product_of(module) for module in modules])
    parts, x = Parts(modules), torch.randn(3, 16)
    outputs = place(parts.products, 0, 3, torch.empty(3 * 48))
    views = parts.split(outputs)
    for product, y in zip(parts.products, outputs, strict=True):
        product.into(x, y)
    assert len(outputs) == (3 if apart else 1)
    for module, view, made in zip(modules, views, parts(x), strict=True):
        torch.testing.assert_close(view, module(x))
        torch.testing.assert_close(made, module(x))


# Unfinished products

SLAB = 40  # inputs, where lut_gemv has 1024


class Slabbed(Dense):
    """A product that leaves sums over slabs of its inputs, with what nobody may read between them."""

    left = 0

    def slabs(self, M, dtype):
        return -(-self.K // SLAB) if M == 1 else 0

    def sums_into(self, x, sums):
        assert sums.shape == (self.slabs(1, x.dtype), padded(self.N))
        assert sums.is_contiguous()
        sums.fill_(torch.nan)
        for s, (part, weight) in enumerate(zip(x.split(SLAB, 1), self.weight.split(SLAB, 1), strict=True)):
            sums[s, : self.N] = part[0] @ weight.T
        Slabbed.left += 1


def with_biases(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = MODELS[name]
    more = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields | more), dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "llama with biases"])
def test_steps_with_unfinished_products(small, monkeypatch, name, apart):
    monkeypatch.setattr(products, "Dense", Slabbed)
    if apart:
        monkeypatch.setattr(products, "join", lambda modules: [products.product_of(module) for module in modules])
    model = small(name) if name == "llama" else with_biases(name.split()[0])
    ids = prompt_ids(model, 12)
    expected = model(ids, output_hidden_states=True)
    for most in (engine_module.NORM_SUMS, 0):
        monkeypatch.setattr(engine_module, "NORM_SUMS", most)
        engine = Engine(weights_of(model), 20)
        engine.prompt(ids[:, :9])
        for t in range(9, 12):
            engine.token.copy_(ids[:, t])
            Slabbed.left = 0
            for i, y in engine.forward():
                assert isinstance(y, Sums if most else torch.Tensor), f"{name=} {apart=} {most=}"
                if i + 1 < model.config.num_hidden_layers:
                    error = relative(engine.h + reference.finished(y), expected.hidden_states[i + 1][:, t])
                    assert error < 1e-5, f"{name=} {apart=} {most=} {t=} {i=} {error=}"
            error = relative(engine.logits, expected.logits[:, t])
            assert error < 1e-5, f"{name=} {apart=} {most=} {t=} {error=}"
            engine.choose()
            everywhere = (3 if apart else 1) + (2 if apart and "llama" in name else 1)
            assert Slabbed.left == model.config.num_hidden_layers * (everywhere + (2 if most else 0)), f"{name=} {apart=}"


class Fusing(Dense):
    """A product that does more, if asked, as far as `able` allows."""

    done, able = [], staticmethod(lambda fusion: True)

    def fuses(self, M, dtype, fusion):
        return M == 1 and Fusing.able(fusion)

    def fused_into(self, x, y, fusion):
        assert x.dtype == y.dtype == torch.float32
        Fusing.done.append(fusion)
        reference.fused(self, x, y, fusion)


ABLE = {
    "all": lambda fusion: True,
    "no sums": lambda fusion: not fusion.add,
    "no norms": lambda fusion: not fusion.norm,
    "no activations": lambda fusion: fusion.function is None,
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("able", ABLE)
@pytest.mark.parametrize("name", ["opt", "llama", "llama with biases"])
def test_steps_with_products_that_do_more(small, monkeypatch, name, able, apart):
    monkeypatch.setattr(products, "Dense", Fusing)
    monkeypatch.setattr(Fusing, "able", staticmethod(ABLE[able]))
    if apart:
        monkeypatch.setattr(products, "join", lambda modules: [products.product_of(module) for module in modules])
    model = small(name) if name == "llama" else with_biases(name.split()[0])
    ids, layers = prompt_ids(model, 12), model.config.num_hidden_layers
    expected = model(ids, output_hidden_states=True)
    engine = Engine(weights_of(model), 20)
    engine.prompt(ids[:, :9])
    gates = apart and "llama" in name  # of two products, which none of them can do
    for t in range(9, 12):
        engine.token.copy_(ids[:, t])
        Fusing.done = []
        for i, y in engine.forward():
            assert (y is None) == (able != "no sums")
            if i + 1 < layers:
                error = relative(engine.h if y is None else engine.h + y, expected.hidden_states[i + 1][:, t])
                assert error < 1e-5, f"{name=} {able=} {apart=} {t=} {i=} {error=}"
        error = relative(engine.logits, expected.logits[:, t])
        assert error < 1e-5, f"{name=} {able=} {apart=} {t=} {error=}"
        engine.choose()
        normed, inward = able in ("all", "no activations"), 3 if apart else 1
        found = [sum(map(kind, Fusing.done)) for kind in (lambda f: f.add, lambda f: f.function is not None, lambda f: f.gated)]
        up = layers if able == "all" and not gates else 0
        assert found == [2 * layers * (able != "no sums"), up, up * ("llama" in name)], f"{name=} {able=} {apart=}"
        first = inward if able == "no sums" else layers * inward if normed else 0  # of the first block nothing is added to h
        assert len(Fusing.done) == found[0] + found[1] + first, f"{name=} {able=} {apart=}"


def test_ranks_and_batches_do_nothing_besides(small, monkeypatch):
    monkeypatch.setattr(products, "Dense", Fusing)
    model = build_model("llama")
    weights = weights_of(model)
    engine = Engine(weights, 20)
    assert all(fusion for fusions in engine.fusions for fusion in fusions)
    assert not any(fusion for fusions in Engine(weights, 20, 2).fusions for fusion in fusions)
    engine.shape = shape_of(model.config, world=2)
    assert not any(engine.fusions_of(weights.layers[0]))


def test_who_finishes_products(small, monkeypatch):
    """Products do for several sequences, for sums over ranks, and where not all that are read together leave as many slabs."""
    monkeypatch.setattr(products, "Dense", Slabbed)
    model = build_model("llama")
    layer = weights_of(model).layers[0]

    def slabs(batch, weights):
        return [found for _, found in Engine(weights, 20, batch).groups(layer)]

    weights = weights_of(model)
    assert slabs(1, weights) == [3, 3, 3, 5]
    assert slabs(2, weights) == [0, 0, 0, 0]
    engine = Engine(weights, 20)
    engine.shape = shape_of(model.config, world=2)
    assert [found for _, found in engine.groups(layer)] == [3, 0, 3, 0]
    two = [layer.out, layer.down]
    assert common_slabs(two, 1, torch.float32) == 0
    assert common_slabs([layer.out, Dense(layer.out.weight, None)], 1, torch.float32) == 0


def draw_sums(slabs, N, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Sums(
        torch.randn(slabs, padded(N), generator=generator)[:, :N], torch.randn(N, generator=generator).half() if bias else None
    )


@pytest.mark.parametrize("slabs", [1, 3, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_functions_read_sums_as_they_read_rows(slabs, bias):
    def both(function, sums, *shapes):
        """What a function makes of sums, and of rows that were finished in float64."""
        exact = [y and (y.slabs.double().sum(0) + (y.bias.double() if bias else 0)).float()[None] for y in sums]
        return [function(*results) for results in (sums, exact)]

    def norm(y):
        h, x = torch.ones(1, 43), torch.empty(1, 43)
        reference.norm(h, y, Norm(torch.ones(43), None, 1e-5, True), x)
        return torch.cat([h, x])

    def activation(gate, up):
        y = torch.empty(1, 43)
        reference.activation("silu", gate, up, y)
        return y

    def attention(q, k, v):
        cache = tuple(torch.ones(1, 2, 5, 8) for _ in range(2))
        rotation = tuple(torch.full((5, 4), 0.5**0.5) for _ in range(2))
        y = torch.empty(1, 32)
        parts = (part.unflatten(1, (-1, 8)) for part in (q, k, v))
        reference.attention(*parts, cache, torch.tensor([3]), rotation, 0.3, y)
        return torch.cat([y.flatten(), *(part.flatten() for part in cache)])

    y, other = draw_sums(slabs, 43, bias), draw_sums(slabs, 43, bias, 1)
    joint = draw_sums(slabs, 64, bias).split([32, 16, 16], dim=1)
    apart = [draw_sums(slabs, N, bias, N) for N in (32, 16, 16)]
    for function, sums in (
        (norm, [y]),
        (activation, [y, other]),
        (activation, [y, None]),
        (attention, joint),
        (attention, apart),
    ):
        found, expected = both(function, sums)
        assert relative(found, expected) < 1e-6, f"{function.__name__} {slabs=} {bias=} {relative(found, expected)=}"


def test_sums_are_added_in_order_and_bias_last():
    slabs = torch.tensor([[1e8, 1.0], [-1e8, 2.0], [1.0, 3.0]])
    assert Sums(slabs, None).finished().tolist() == [[1.0, 6.0]]
    assert Sums(slabs.flip(0), None).finished().tolist() == [[0.0, 6.0]]
    assert Sums(slabs, torch.tensor([0.5, 0.25])).finished().tolist() == [[1.5, 6.25]]


def test_layers_in_kernel_order_leave_sums_that_kernels_read(monkeypatch):
    layer = LayerConfig(3, 128, "bcq", True)
    (joint,) = join([kernel_order(64, 300, layer, i, bias=True) for i in range(2)])
    asked = []

    def sum_parts(ready, N, K, layer, gpu):
        asked.append((ready, N, K, layer, gpu))
        return 1

    def multiply_sums(x, ready, partial, N, layer):
        assert (ready, N, partial.shape) == (joint.ready, 128, (1, 128))
        partial.fill_(7)

    monkeypatch.setattr("lutq.cuda.properties", lambda device: "a GPU")
    monkeypatch.setattr("lutq.cuda.sum_parts", sum_parts)
    monkeypatch.setattr("lutq.cuda.multiply_sums", multiply_sums)
    joint.bias = joint.bias.half()
    assert joint.slabs(2, torch.float16) == 0, "several rows"
    assert joint.slabs(1, torch.bfloat16) == 0, "a bias of another dtype"
    assert joint.slabs(1, torch.float16) == 1
    assert asked == [(joint.ready, 128, 300, layer, "a GPU")]
    (y,) = place([joint], 1, 1, torch.zeros(128))
    reference.multiply(joint, torch.zeros(1, 300), y)
    assert torch.equal(y.finished(), 7 + joint.bias[None].float())
    joint.bias = torch.zeros(129, dtype=torch.float16)[1:]
    assert joint.slabs(1, torch.float16) == 0, "a bias that is not on 16 bytes"


# The graph engine


class Forbidding(TorchDispatchMode):
    """Fails on operations whose result the host reads: those that a CUDA graph cannot hold."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        assert name not in self.WAITING, f"{name} waits for the GPU"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*FAMILIES, "quantized"])
def test_graph_engine_is_the_plain_loop(small, name):
    model = small(name)
    ids = prompt_ids(model, 11)
    engine = make("graph", model, 40, GREEDY)
    for turn in range(2):
        found = []
        continue_text(engine, ids, 25, (), found.append)
        assert found == greedy(model, ids, 25), f"{name=} {turn=}"
    with Forbidding():
        engine.step()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0), Sampling(repetition_penalty=1.3), GREEDY], ids=str)
def test_no_step_waits_for_the_host(small, sampling):
    model = small("llama")
    ids = prompt_ids(model, 5)
    for name in ("fast", "graph"):
        engine = make(name, model, 20, sampling)
        engine.prompt(ids)
        with Forbidding():
            engine.step()


def test_a_step_that_depends_on_the_host_is_found_out(small):
    model = copy.deepcopy(small("llama"))
    forward, calls = model.forward, itertools.count()

    def changing(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits.roll(next(calls), -1).copy_(result.logits)
        result.logits = result.logits.roll(next(calls), -1)
        return result

    changing.__signature__ = __import__("inspect").signature(forward)
    model.forward = changing
    with pytest.raises(RefusedError, match=r"captured steps differ from ordinary ones by .*; use --engine plain"):
        make("graph", model, 20, GREEDY)


def test_what_the_graph_engine_does_not_take(small):
    model = copy.deepcopy(small("llama"))
    model._can_compile_fullgraph = False
    with pytest.raises(RefusedError, match="transformers has no static cache for it; use --engine plain"):
        General(model, 20, Sampler(GREEDY, 4096, 1, model.device))
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(RefusedError, match="it has layers of linear_attention"):
        General(model, 20, Sampler(GREEDY, 4096, 1, model.device))


# Choice


class OnGpu:
    """A model that says it is on a GPU."""

    def __init__(self, model):
        self.model, self.device = model, torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_auto_takes_the_first_that_works(small, monkeypatch):
    tried = []

    def attempt(name, model, capacity, settings, batch):
        tried.append(name)
        if name in refusing:
            raise RefusedError(name, "of a test")
        return name

    monkeypatch.setattr("lutq.decode.choose.make", attempt)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = OnGpu(small("llama"))
    for refusing, expected in (((), "fast"), (("fast",), "graph"), (("fast", "graph"), None)):
        tried.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert choose("auto", model, 10, GREEDY) == expected, f"{refusing=}"
        texts = [str(warning.message) for warning in caught]
        slower = {"fast": "graph", "graph": "plain"}
        assert texts == [
            f"lutq decodes with --engine {slower[name]}: {name} does not take this model: of a test" for name in refusing
        ]
    assert choose("auto", small("llama"), 10, GREEDY) is None, "on the CPU"
    assert choose("plain", model, 10, GREEDY) is None
    refusing = ("fast",)
    with pytest.raises(RefusedError, match="use --engine graph"):
        choose("fast", model, 10, GREEDY)
    with pytest.raises(LutqError, match="unknown engine 'quick': use auto, fast, graph, plain"):
        choose("quick", model, 10, GREEDY)


# Sampling


def frequencies(sampler, logits, count=4000):
    torch.manual_seed(0)
    tokens = sampler(logits.expand(count, -1))
    return tokens.bincount(minlength=logits.shape[1]) / count


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=0, top_p=1.0),
        Sampling(temperature=0.5, top_k=0, top_p=1.0),
        Sampling(temperature=1.0, top_k=4, top_p=1.0),
        Sampling(temperature=1.0, top_k=0, top_p=0.8),
        Sampling(temperature=2.0, top_k=5, top_p=0.6),
        Sampling(temperature=1.0, top_k=3, top_p=1e-6),
    ],
    ids=str,
)
def test_sampling_is_that_of_transformers(sampling):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[2.0, -1.0, 0.5, 1.7, -0.3, 1.0, -4.0, 0.1]])
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits) if sampling.temperature != 1 else logits
    warped = TopKLogitsWarper(sampling.top_k)(None, warped) if sampling.top_k else warped
    warped = TopPLogitsWarper(sampling.top_p)(None, warped) if sampling.top_p < 1 else warped
    expected = warped.softmax(-1)[0]
    found = frequencies(Sampler(sampling, 8, 1, logits.device), logits)
    assert torch.equal(found > 0, expected > 1e-4), f"{sampling=} {found=} {expected=}"
    assert (found - expected).abs().max() < 0.03, f"{sampling=} {found=} {expected=}"


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=1.7), 8, 2, torch.device("cpu"))
    assert not sampler.greedy
    ids = torch.tensor([[1, 3, 1], [5, 5, 5]])
    for _ in range(2):
        sampler.reset(ids)
        logits, seen = torch.tensor([[2.0, 3.0, 1.0, -1.0, 2.2, 0.0, 0.0, 1.0]]).repeat(2, 1), ids
        for _ in range(4):
            expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits).argmax(-1)
            assert torch.equal(sampler(logits), expected), f"{seen=}"
            seen = torch.cat([seen, expected[:, None]], 1)


# `lutq generate`


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return load_tokenizer(embedded)


@pytest.mark.parametrize("engine", ["fast", "graph"])
@pytest.mark.parametrize("prompt", ["The old man walked slowly to the house, and", "In 1987 ,", "“It was”, she said: ¿no?"])
def test_greedy_text_is_that_of_the_plain_engine(small, tokenizer, engine, prompt):
    sampling = Sampling(max_new_tokens=30, temperature=0.0)
    pieces = []
    expected = generate(small("quantized"), tokenizer, prompt, sampling)
    found = generate(small("quantized"), tokenizer, prompt, sampling, write=pieces.append, engine=engine)
    assert found.text == expected.text, f"{engine=} {prompt=}"
    assert "".join(pieces) == found.text
    assert len(pieces) > 5, "not streamed"
    assert (found.prompt_tokens, found.new_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert (found.engine, expected.engine) == (engine, "plain")
    assert found.summary().endswith(f"; backend {CPU_BACKEND}, engine {engine}"), found.summary()
    assert expected.summary().endswith(f"; backend {CPU_BACKEND}"), expected.summary()


@pytest.mark.parametrize("engine", ["fast", "graph"])
def test_flags_of_sampling_work(small, tokenizer, engine):
    model, prompt = small("quantized"), "The old man walked"
    greedy = generate(model, tokenizer, prompt, Sampling(max_new_tokens=12, temperature=0.0)).text

    def text(**options):
        return generate(model, tokenizer, prompt, Sampling(max_new_tokens=12, **options), engine=engine).text

    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4, "top_k": 0, "top_p": 1.0}):
        assert text(seed=5, **options) == greedy, f"{options=}"
    texts = [text(seed=seed) for seed in (0, 1, 2)]
    assert texts == [text(seed=seed) for seed in (0, 1, 2)], "not repeatable"
    assert len(set(texts)) == 3, f"{texts=}"
    expected = generate(model, tokenizer, prompt, Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1.5)).text
    assert text(temperature=0.0, repetition_penalty=1.5) == expected


@pytest.mark.parametrize("engine", ["fast", "graph"])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("many", [False, True])
def test_stop_tokens(small, tokenizer, monkeypatch, engine, place, many):
    model, prompt, sampling = small("quantized"), "The old man walked", Sampling(max_new_tokens=20, temperature=0.0)
    tokens = []
    continue_text(Engine(weights_of(model), 60), tokenizer(prompt, return_tensors="pt").input_ids, 20, (), tokens.append)
    stop = tokens[place]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [4095, stop] if many else stop)
    found = generate(model, tokenizer, prompt, sampling, engine=engine)
    expected = generate(model, tokenizer, prompt, sampling)
    assert found.new_tokens == expected.new_tokens == tokens.index(stop) + 1, f"{engine=} {place=}"
    assert found.text == expected.text


@pytest.mark.parametrize("engine", ["fast", "graph"])
@pytest.mark.parametrize("room", [1, 2, 5])
def test_the_end_of_the_context(small, tokenizer, engine, room):
    model = small("quantized")
    prompt = " the" * (1023 - room)
    sampling = Sampling(max_new_tokens=50, temperature=0.0)
    found, expected = (generate(model, tokenizer, prompt, sampling, engine=name) for name in (engine, "plain"))
    assert (found.prompt_tokens, found.new_tokens) == (1024 - room, room), f"{found}"
    assert found.text == expected.text


@pytest.mark.parametrize("engine", ["fast", "graph"])
def test_through_the_command_line(embedded, lutq_command, engine):
    for model in ("opt-tiny", embedded):
        flags = ("--model", model, "--max-new-tokens", "12", "--temperature", "0", "--device", "cpu")
        plain, other = (lutq_command("generate", "In 1987 ,", *flags, "--engine", name) for name in ("plain", engine))
        assert plain.returncode == other.returncode == 0, other.stderr
        assert plain.stdout == other.stdout
        assert other.stderr.endswith(f", engine {engine}]\n"), other.stderr
    result = lutq_command("generate", "In 1987 ,", "--model", "opt-tiny", "--engine", "quick")
    assert (result.returncode, result.stderr) == (2, "lutq: unknown engine 'quick': use auto, fast, graph, plain\n")


@torch.inference_mode(False)
def test_a_model_stays_a_model():
    """What the engine leaves in it works outside inference mode: copies, casts and gradients of inputs."""
    model = build_model("llama")
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        Engine(weights_of(model), 20).prompt(prompt_ids(model, 5))
    ids = prompt_ids(model, 5)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0
    other = copy.deepcopy(model).to(torch.float64)
    assert all(torch.equal(tensor.float(), state[name]) for name, tensor in other.state_dict().items())


def test_an_interrupted_loop_ends(small):
    engine = Engine(weights_of(small("llama")), 64)

    def interrupt(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continue_text(engine, prompt_ids(small("llama"), 4), 5, (), interrupt)
    ids, found = prompt_ids(small("llama"), 4, 3), []
    continue_text(engine, ids, 5, (), found.append)
    assert found == greedy(small("llama"), ids, 5)


# The reference functions, against plain formulas


def test_choice_is_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [-1.0, -5.0, -1.0]], dtype=torch.float16)
    token, position = torch.zeros(2, dtype=torch.int64), torch.tensor([4, 8])
    reference.choose(logits, token, position, 8)
    assert token.tolist() == [1, 0]
    assert position.tolist() == [5, 8]


def test_attention_reads_nothing_past_the_position():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    cache = (torch.full((2, 2, 9, 16), torch.nan), torch.full((2, 2, 9, 16), torch.nan))
    position = torch.tensor([0, 5])
    for part in cache:
        part[1, :, :5] = torch.randn(2, 5, 16)
    y = torch.empty(2, 64)
    reference.attention(q, k, v, cache, position, None, 0.25, y)
    for m, t in enumerate(position.tolist()):
        keys, values = (part[m, :, : t + 1].repeat_interleave(2, 0) for part in cache)
        weights = (0.25 * q[m][:, None] @ keys.transpose(1, 2)).softmax(-1)
        torch.testing.assert_close(y[m].view(4, 16), (weights @ values)[:, 0])
    assert torch.equal(cache[0][1, :, 5], k[1])
