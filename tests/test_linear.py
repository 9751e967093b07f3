"""`torch.ops.lutq.linear` against a float64 product, and LutLinear as a citizen of torch."""

import copy

import pytest
import torch
from conftest import CPU_BACKEND

from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.pack import Packed, pack_bits, packed_shapes

LAYERS = [
    LayerConfig(bits, group, grid, offsets)
    for bits, group in ((1, 0), (2, 32), (3, 128), (4, 64))
    for grid in ("bcq", "uniform")
    for offsets in (False, True)
]
# the weights are rounded to the dtype once and so is the result: half a unit in the last place each
LIMITS = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PACKED_DTYPES = {"codes": torch.int32, "scales": torch.float16, "offsets": torch.float16, "zero_points": torch.uint8}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_layer(N, K, layer, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = packed_shapes(N, K, layer)
    scales = (torch.rand(shapes["scales"][0], generator=random) + 0.1).half()
    offsets = torch.randn(shapes["offsets"][0], generator=random).half() if "offsets" in shapes else None
    zero_points = None
    if "zero_points" in shapes:
        zero_points = torch.randint(0, 2**layer.bits, shapes["zero_points"][0], generator=random, dtype=torch.uint8)
    codes = pack_bits(torch.rand(layer.bits, N, K, generator=random) < 0.5)
    vector = torch.randn(N, generator=random) if bias else None
    return LutLinear.from_packed(Packed(codes, scales, offsets, zero_points), K, layer, vector)


def packed_of(module):
    return {name: getattr(module, name) for name in Packed._fields if getattr(module, name) is not None}


def check_kept(module, before, about):
    """The packed tensors have their dtypes and every bit of before."""
    after = packed_of(module)
    assert after.keys() == before.keys(), f"{about} {after.keys()=}"
    for name, tensor in after.items():
        assert tensor.dtype == PACKED_DTYPES[name], f"{about} {name} {tensor.dtype=}"
        assert tensor.shape == before[name].shape, f"{about} {name} {tensor.shape=}"
        if not tensor.is_meta:
            assert torch.equal(tensor, before[name]), f"{about} {name}"


def relative_error(y, x, module):
    """Of y against the product in float64, with the weights as they are dequantized to fp32."""
    expected = x.double() @ module.dequantize().double().T
    if module.bias is not None:
        expected += module.bias.double()
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_product(dtype, layer, bias):
    for N, K in ((16, 1), (7, 100), (33, 576)):
        module = random_layer(N, K, layer, bias).to(dtype)
        for shape in ((K,), (1, K), (5, K), (2, 3, K)):
            x = gaussian(*shape).to(dtype)
            y = module(x)
            about = f"{dtype=} {layer=} {bias=} {N=} {K=} {shape=}"
            assert y.dtype == dtype, f"{about} {y.dtype=}"
            assert y.shape == (*shape[:-1], N), f"{about} {y.shape=}"
            error = relative_error(y, x, module)
            assert error <= 2 * LIMITS[dtype], f"{about} {error=}"


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("bias", [False, True])
def test_no_tokens(dtype, bias):
    module = random_layer(7, 100, LAYERS[0], bias).to(dtype)
    for shape in ((0, 100), (2, 0, 100), (0, 3, 100)):
        y = module(torch.zeros(shape, dtype=dtype))
        assert y.shape == (*shape[:-1], 7), f"{dtype=} {bias=} {shape=} {y.shape=}"
        assert y.dtype == dtype, f"{dtype=} {bias=} {shape=} {y.dtype=}"


def strided_inputs(K, dtype):
    """Name and x [..., K] that is not contiguous."""
    wide = gaussian(10, 2 * K).to(dtype)
    return {
        "transposed": wide.view(2 * K, 10)[:K].T,
        "every other input": wide[:, ::2],
        "every other token": wide.view(20, K)[::2],
        "batch and tokens exchanged": wide.view(4, 5, K).transpose(0, 1),
        "expanded": wide[0, :K].expand(2, 3, K),
        "one token with every other input": wide[0, ::2],
    }


@pytest.mark.parametrize("dtype", LIMITS)
def test_input_need_not_be_contiguous(dtype):
    module = random_layer(33, 100, LayerConfig(3, 32)).to(dtype)
    for name, x in strided_inputs(100, dtype).items():
        assert not x.is_contiguous(), f"{name} {dtype=} {x.stride()=}"
        error = relative_error(module(x), x, module)
        assert error <= 2 * LIMITS[dtype], f"{name} {dtype=} {error=}"


@pytest.mark.parametrize("K", [96, 100])
@pytest.mark.parametrize("group", [0, 32])
def test_input_of_the_wrong_width_raises(K, group):
    module, accepted = random_layer(7, K, LayerConfig(3, group)), []
    for width in (1, 64, K - 4, K - 1, K + 1, K + 4, K + 28, K + 32):
        try:
            module(gaussian(2, width))
            accepted.append(width)
        except (RuntimeError, LutqError):  # as of nn.Linear; the padding of the last word must not hide it
            pass
    assert accepted == [], f"{K=} {group=} {accepted=}"


@pytest.mark.parametrize("layer", LAYERS)
def test_meta_gives_shape_and_dtype(layer):
    for bias in (False, True):
        module = random_layer(7, 100, layer, bias).to("meta")
        for dtype in LIMITS:
            for shape in ((100,), (5, 100), (2, 3, 100), (0, 100)):
                y = module.to(dtype)(torch.empty(shape, dtype=dtype, device="meta"))
                about = f"{layer=} {bias=} {dtype=} {shape=}"
                assert y.is_meta, about
                assert y.shape == (*shape[:-1], 7), f"{about} {y.shape=}"
                assert y.dtype == dtype, f"{about} {y.dtype=}"


def opcheck(module, x, about):
    args = (
        x,
        module.codes,
        module.scales,
        module.offsets,
        module.zero_points,
        module.bias,
        module.layer.group,
        module.layer.grid,
    )
    results = torch.library.opcheck(torch.ops.lutq.linear.default, args)
    assert set(results.values()) == {"SUCCESS"}, f"{about} {results=}"


@pytest.mark.parametrize("layer", [LayerConfig(3, 32), LayerConfig(2, 0, offsets=False), LayerConfig(4, 64, "uniform")])
def test_opcheck_of_layers(layer):
    for dtype, bias in ((torch.float32, False), *((dtype, True) for dtype in LIMITS)):
        opcheck(random_layer(7, 100, layer, bias).to(dtype), gaussian(5, 100).to(dtype), f"{layer=} {bias=} {dtype=}")


def test_opcheck_of_inputs():
    contiguous = {"[K]": gaussian(100), "[B, M, K]": gaussian(2, 3, 100), "M = 0": gaussian(0, 100)}
    for name, x in (contiguous | strided_inputs(100, torch.float32)).items():
        opcheck(random_layer(7, 100, LayerConfig(3, 32)), x, name)


@pytest.mark.parametrize("layer", [LayerConfig(3, 32), LayerConfig(4, 0, "uniform")])
def test_compiled_is_eager(layer):
    torch.compiler.reset()
    module = random_layer(7, 100, layer)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((100,), (1, 100), (5, 100), (2, 3, 100)):
        x = gaussian(*shape)
        assert torch.equal(compiled(x), module(x)), f"{layer=} {shape=}"


CASTS = {
    "to(bfloat16)": (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    "half()": (lambda module: module.half(), torch.float16),
    "bfloat16()": (lambda module: module.bfloat16(), torch.bfloat16),
    "double()": (lambda module: module.double(), torch.float64),
    "float()": (lambda module: module.half().float(), torch.float32),
    "to(cpu, double)": (lambda module: module.to("cpu", torch.float64), torch.float64),
    "to(meta)": (lambda module: module.to("meta"), torch.float32),
    "to(meta, half)": (lambda module: module.to("meta", torch.float16), torch.float16),
    "to_empty(meta)": (lambda module: module.to_empty(device="meta"), torch.float32),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("layer", [LayerConfig(3, 32), LayerConfig(3, 32, offsets=False), LayerConfig(3, 32, "uniform")])
@pytest.mark.parametrize("inside", [False, True])
def test_casts_keep_the_packed_tensors(name, layer, inside):
    cast, dtype = CASTS[name]
    module = random_layer(7, 100, layer)
    before = {part: tensor.clone() for part, tensor in packed_of(module).items()}
    cast(torch.nn.Sequential(module, torch.nn.ReLU()) if inside else module)
    check_kept(module, before, f"{name} {layer=} {inside=}")
    assert module.bias.dtype == dtype, f"{name} {layer=} {inside=} {module.bias.dtype=}"
    assert module.bias.is_meta == ("meta" in name), f"{name} {layer=} {inside=} {module.bias.device=}"
    assert all(tensor.is_meta == ("meta" in name) for tensor in packed_of(module).values()), f"{name} {layer=} {inside=}"


def test_the_way_to_bfloat16_and_back_changes_nothing():
    module = random_layer(7, 100, LayerConfig(3, 32))
    x, before = gaussian(2, 100), random_layer(7, 100, LayerConfig(3, 32))
    module.bfloat16().float()
    assert torch.equal(module.dequantize(), before.dequantize())
    assert torch.equal(module.scales, before.scales)
    module.bias = before.bias  # which a cast may round
    assert torch.equal(module(x), before(x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(tmp_path, layer, assign):
    module, x = random_layer(7, 100, layer), gaussian(2, 100)
    torch.save(module.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert set(state) == {*packed_of(module), "bias"}, f"{layer=} {set(state)=}"
    bias = torch.nn.Parameter(torch.empty(7, device="meta" if assign else "cpu"), requires_grad=False)
    loaded = LutLinear(100, 7, layer, bias, device="meta" if assign else "cpu")
    loaded.load_state_dict(state, strict=True, assign=assign)
    check_kept(loaded, packed_of(module), f"{layer=} {assign=}")
    assert torch.equal(loaded(x), module(x)), f"{layer=} {assign=}"


def test_state_dict_of_another_layer_is_refused():
    state = random_layer(7, 100, LayerConfig(3, 32)).state_dict()
    for layer in (LayerConfig(2, 32), LayerConfig(3, 64), LayerConfig(3, 32, "uniform"), LayerConfig(3, 32, offsets=False)):
        with pytest.raises(RuntimeError):
            LutLinear(100, 7, layer, torch.nn.Parameter(torch.empty(7))).load_state_dict(state, strict=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_deepcopy(layer):
    module, x = random_layer(7, 100, layer), gaussian(2, 100)
    twin, before = copy.deepcopy(module), module(x)
    assert torch.equal(twin(x), before), f"{layer=}"
    assert twin.layer == layer, f"{layer=} {twin.layer=}"
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(module(x), before), f"a deep copy shares memory: {layer=}"


def test_nothing_is_trainable():
    module = random_layer(7, 100, LayerConfig(3, 32))
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == []
    assert not module(gaussian(2, 100)).requires_grad


def test_unknown_backend_is_refused():
    module, x = random_layer(7, 100, LayerConfig(3, 32)), gaussian(2, 100)
    module.backend = "abacus"
    with pytest.raises(LutqError, match=r"unknown backend 'abacus': use auto or .*reference"):
        module(x)
    module.backend = CPU_BACKEND
    named = module(x)
    module.backend = "auto"
    assert torch.equal(module(x), named)


def test_repr_says_what_it_is():
    text = repr(random_layer(7, 100, LayerConfig(3, 32)))
    for part in ("100", "7", "bits=3", "group=32", "grid=bcq", "offsets=True", "bias=True"):
        assert part in text, f"{part=} {text=}"


def test_layers_that_accelerate_offloads_stay_canonical():
    from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module

    layer = LayerConfig(2, 32, "bcq", True)
    for hook, offloaded in (
        (AlignDevicesHook(execution_device="cpu", offload=True), True),
        (SequentialHook(ModelHook(), AlignDevicesHook(execution_device="cpu", offload=True)), True),
        (AlignDevicesHook(execution_device="cpu"), False),
        (None, False),
    ):
        module = random_layer(16, 64, layer)
        x = gaussian(2, 64)
        before = module(x)
        if hook is not None:
            add_hook_to_module(module, hook)
        assert module.is_offloaded() is offloaded, f"{hook=}"
        assert torch.equal(module(x), before), f"{hook=}"
