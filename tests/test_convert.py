"""`lutq convert`: checkpoints in the published layouts, written here field by field, come back as the weights they mean.

The packing below is written from the layouts' documentation with Python integers and shares nothing with lutq/foreign.py.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import copy_tokenizer
from safetensors.torch import load_file, save_file

from lutq.convert import convert, convert_checkpoint, find_layer
from lutq.errors import LutqError
from lutq.foreign import fields, grouping, layout_of, numbers
from lutq.linear import LutLinear
from lutq.ordered import OrderedLinear
from lutq.pack import dequantize

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
COMMON = {"vocab_size": 128, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 64}
FAMILIES = {
    "opt": COMMON | {"hidden_size": 96, "ffn_dim": 160, "num_hidden_layers": 1, "num_attention_heads": 4, "init_std": 0.1}
    | {"word_embed_proj_dim": 96},
    "llama": COMMON | {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 6}
    | {"num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": False},
}  # fmt: skip


def to_words(values, bits):
    """A list of integers as int32 words, one after the other from the lowest bit on."""
    whole = sum(int(value) << (bits * i) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return np.frombuffer(whole.to_bytes(4 * count, "little"), dtype="<i4")


def pack_rows(values, bits, in_word=0):
    """[R, count] -> int32 [R, words]; with `in_word` each word holds so many values and the rest of it is 0."""
    if in_word:
        chunks = [[to_words(row[i : i + in_word], bits) for i in range(0, len(row), in_word)] for row in values.tolist()]
        return torch.tensor(np.array([np.concatenate(row) for row in chunks]))
    return torch.tensor(np.array([to_words(row, bits) for row in values.tolist()]))


def pack_awq(values):
    """[R, N] -> int32 [R, N/8]: field i of a word is column AWQ_ORDER[i] of eight."""
    arranged = [[row[8 * c + k] for c in range(len(row) // 8) for k in AWQ_ORDER] for row in values.tolist()]
    return torch.tensor(np.array([to_words(row, 4) for row in arranged]))


class Made:
    """A random layer: u [N, K], zero points and scales [N, G], groups [K]; tensors as a layout stores them."""

    def __init__(self, N, K, bits, group=32, symmetric=False, act_order=False, dtype=torch.float16, seed=0):
        random = torch.Generator().manual_seed(1000 * seed + 100 * bits + group + symmetric)
        self.N, self.K, self.bits = N, K, bits
        self.group = K if group == -1 else group
        G = -(-K // self.group)
        self.u = torch.randint(0, 2**bits, (N, K), generator=random)
        self.zeros = torch.randint(1, 2**bits, (N, G), generator=random)  # 0 is stored as -1 in the first format of GPTQ
        if symmetric:
            self.zeros = torch.full((N, G), 2 ** (bits - 1))
        signs = 1 - 2 * torch.randint(0, 2, (N, G), generator=random)  # AutoRound's symmetric scales may be negative
        self.scales = (signs * (0.01 + 0.1 * torch.rand(N, G, generator=random))).to(dtype)
        self.groups = torch.arange(K) // self.group
        if act_order:
            self.groups = self.groups[torch.randperm(K, generator=random)]
        self.symmetric, self.act_order = symmetric, act_order

    def weight(self):
        """The layout's own formula in float64, which is exact: [N, K]."""
        return self.scales.double()[:, self.groups] * (self.u - self.zeros[:, self.groups]).double()

    def tensors(self, kind, g_idx=True):
        """Name -> tensor."""
        if kind == "awq":
            return {"qweight": pack_awq(self.u.T), "qzeros": pack_awq(self.zeros.T), "scales": self.scales.T.contiguous()}
        if kind in ("compressed-tensors", "compressed-tensors-old"):
            in_word = 32 // self.bits if kind.endswith("old") else 0
            made = {
                "weight_packed": pack_rows(self.u, self.bits, in_word),
                "weight_scale": self.scales,
                "weight_shape": torch.tensor([self.N, self.K]),
            }
            if not self.symmetric:
                made["weight_zero_point"] = pack_rows(self.zeros.T, self.bits, in_word).T.contiguous()
            return made | ({"weight_g_idx": self.groups.int()} if self.act_order else {})
        stored = self.zeros - int(kind == "gptq")
        made = {
            "qweight": pack_rows(self.u, self.bits).T.contiguous(),
            "qzeros": pack_rows(stored.T, self.bits),
            "scales": self.scales.T.contiguous(),
        }
        return made | ({"g_idx": self.groups.int()} if g_idx else {})


def config_of(kind, bits, group=32, symmetric=False, act_order=False):
    """The quantization_config that goes with a layout."""
    if kind.startswith("compressed-tensors"):
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": "group" if act_order else None}
        weights |= {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        top = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
        return top | {"quantization_status": "compressed", "config_groups": {"group_0": scheme}, "kv_cache_scheme": None}
    common = {"bits": bits, "group_size": group}
    if kind == "awq":
        return common | {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    return common | {"quant_method": "gptq", "checkpoint_format": kind, "desc_act": act_order, "sym": symmetric}


def convert_layer(tensors, config, N, K):
    """What lutq stores of one layer, as lutq/convert.py makes it, and its LayerConfig."""
    layout = layout_of(config)
    source = SimpleNamespace(
        shape=lambda key: tuple(tensors[key].shape), dtype=lambda key: tensors[key].dtype, tensor=lambda key: tensors[key]
    )
    keys = {part: name for part, name in layout.names.items() if name in tensors}
    layer = find_layer(source, layout, "layer", keys, N, K)
    return convert({part: tensors[name] for part, name in keys.items()}, layout, layer), layer.layer


def values(stored, layer, K, dtype=torch.float32):
    """The weight [N, K] of what lutq stores, its inputs in the model's order."""
    W = dequantize(stored["codes"], stored["scales"], None, stored["zero_points"], layer.group, layer.grid, K, dtype)
    if "input_order" not in stored:
        return W
    out = torch.empty_like(W)
    out[:, stored["input_order"].long()] = W
    return out


CASES = [
    *itertools.product(("gptq", "gptq_v2"), (2, 3, 4, 8), (False, True), (32, 64, -1), (False, True)),
    *itertools.product(("awq",), (4,), (False, True), (32, -1), (False,)),
    *itertools.product(("compressed-tensors", "compressed-tensors-old"), (2, 3, 4, 8), (False, True), (32, -1), (False, True)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_layout_is_exact(dtype):
    """All widths, groups, zero points and orders: float64 values are equal, and so is the source's product in 16 bits."""
    N, K = 64, 160
    for kind, bits, symmetric, group, act_order in CASES:
        about = f"{kind=}, {bits=}, {symmetric=}, {group=}, {act_order=}, {dtype=}"
        made = Made(N, K, bits, group, symmetric, act_order, dtype)
        if kind != "gptq" and not symmetric:
            made.zeros[0] = 0
        config = config_of(kind, bits, group, symmetric, act_order)
        stored, layer = convert_layer(made.tensors(kind), config, N, K)
        assert torch.equal(values(stored, layer, K).double(), made.weight()), about
        own = made.scales[:, made.groups] * (made.u - made.zeros[:, made.groups]).to(dtype)
        assert torch.equal(values(stored, layer, K, dtype), own), about
        ordered = act_order and group != -1
        assert ("input_order" in stored) == ordered, about
        assert layer.bits == bits, about
        assert layer.group == (0 if group == -1 else group), about


def test_groups_without_g_idx():
    """AutoRound and old GPTQ files have no g_idx: consecutive groups, the last of which may be short."""
    for K, group in ((160, 64), (160, 32), (96, -1)):
        made = Made(32, K, 4, group)
        stored, layer = convert_layer(made.tensors("gptq", g_idx=False), config_of("gptq", 4, group), 32, K)
        assert torch.equal(values(stored, layer, K).double(), made.weight()), f"{K=}, {group=}"


def test_auto_round():
    """The names of AutoRound's packings, old and new."""
    kinds = {
        "auto_round:auto_gptq": "gptq",
        "auto_round:gptq": "gptq",
        "auto_round": "gptq_v2",
        "auto_round:gptqmodel": "gptq_v2",
        "auto_round:auto_awq": "awq",
    }
    for packing, kind in kinds.items():
        made = Made(32, 96, 4)
        config = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": True}
        stored, layer = convert_layer(made.tensors(kind, g_idx=False), config, 32, 96)
        assert torch.equal(values(stored, layer, 96).double(), made.weight()), packing


def test_layers_that_differ():
    """Bits and groups are each layer's own, whatever the config says of all of them."""
    for bits, group in ((2, 96), (3, 48 * 2), (4, 32)):
        made = Made(32, 192, bits, group)
        stored, layer = convert_layer(made.tensors("gptq", g_idx=False), config_of("gptq", 4, 64), 32, 192)
        assert torch.equal(values(stored, layer, 192).double(), made.weight()), f"{bits=}, {group=}"
    config = config_of("compressed-tensors", 4)
    config["config_groups"]["group_1"] = config_of("compressed-tensors", 3, -1, True)["config_groups"]["group_0"]
    for bits, group, symmetric in ((4, 32, False), (3, -1, True)):
        made = Made(32, 96, bits, group, symmetric)
        stored, layer = convert_layer(made.tensors("compressed-tensors"), config, 32, 96)
        assert torch.equal(values(stored, layer, 96).double(), made.weight()), f"{bits=}, {group=}"


def test_compressed_tensors_of_other_versions():
    """Zero points in int8, one scale for all, and a weight_g_idx of -1, which means none."""
    made = Made(32, 96, 4)
    tensors = made.tensors("compressed-tensors") | {"weight_zero_point": (made.zeros - 8).to(torch.int8)}
    tensors["weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    stored, layer = convert_layer(tensors, config_of("compressed-tensors", 4), 32, 96)
    assert torch.equal(values(stored, layer, 96).double(), made.weight()), "int8 zero points"
    made = Made(32, 96, 4, -1, symmetric=True)
    made.scales[:] = made.scales[0]
    tensors = made.tensors("compressed-tensors") | {"weight_scale": made.scales[0]}
    stored, layer = convert_layer(tensors, config_of("compressed-tensors", 4, -1, True), 32, 96)
    assert torch.equal(values(stored, layer, 96).double(), made.weight()), "one scale"


def test_grouping():
    """Consecutive groups stay, runs of whole words become smaller groups, the rest is sorted."""
    assert grouping(torch.arange(160) // 64)[0] == 64
    g, picked, order = grouping(torch.tensor([2] * 64 + [0] * 32 + [1] * 64))
    assert (g, picked.tolist(), order) == (32, [2, 2, 0, 1, 1], None), "runs of whole words"
    scattered = torch.tensor([1, 0]).repeat(64)
    g, picked, order = grouping(scattered)
    assert (g, picked.tolist()) == (64, [0, 1])
    assert torch.equal(scattered[order], torch.arange(128) // 64)
    assert torch.equal(order, torch.cat([torch.arange(1, 128, 2), torch.arange(0, 128, 2)])), "inputs of a group in their order"
    with pytest.raises(LutqError, match="multiples of 16 inputs"):
        grouping(torch.arange(128) // 16)


def test_fields_against_integers():
    """Every width that a word can hold, across words and within them."""
    for bits, in_word in itertools.product(range(1, 9), (False, True)):
        wanted = torch.randint(0, 2**bits, (3, 77), generator=torch.Generator().manual_seed(bits))
        at = 32 // bits if in_word else 0
        found = numbers(fields(pack_rows(wanted, bits, at), bits, 77, at))
        assert torch.equal(found.long(), wanted), f"{bits=}, {in_word=}"


def write_checkpoint(folder, family, kind, quantization, make, keep=("lm_head",), dtype=torch.float16, limit="10GB", tied=False):
    """A checkpoint in a foreign layout, and the same model with its dequantized weights, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | {"tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    reference = {key: tensor.float() for key, tensor in model.state_dict().items()}
    for seed, (name, module) in enumerate(linears.items()):
        if name in keep:
            continue
        made = make(module.out_features, module.in_features, seed)
        state.pop(f"{name}.weight", None)
        state |= {f"{name}.{part}": tensor for part, tensor in made.tensors(kind).items()}
        reference[f"{name}.weight"] = made.weight().float()
    if tied:
        config = AutoConfig.for_model(family, **FAMILIES[family])
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense.load_state_dict(reference)
    model.save_pretrained(folder, max_shard_size=limit)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if limit == "10GB":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        save_shards(folder, state)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    copy_tokenizer(folder)
    return dense, state


def save_shards(folder, state):
    """Two files and an index; a layer's tensors are apart."""
    names, weight_map = sorted(state), {}
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({key: state[key].contiguous() for key in names[i::2]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def maker(bits, group=32, symmetric=False, act_order=False, dtype=torch.float16):
    """`make(N, K, seed)` for write_checkpoint: the layers that read the same input have one order."""
    return lambda N, K, seed: Made(N, K, bits, group, symmetric, act_order, dtype, seed)


MODELS = [
    ("opt", "gptq", 4, 64, True, False),
    ("opt", "gptq_v2", 3, 32, False, True),
    ("opt", "awq", 4, 32, False, False),
    ("llama", "gptq", 2, -1, False, False),
    ("llama", "gptq", 4, 32, True, True),
    ("llama", "compressed-tensors", 4, 32, False, True),
    ("llama", "compressed-tensors", 3, -1, True, False),
    ("llama", "gptq_v2", 8, 32, False, True),
    ("opt", "compressed-tensors", 8, -1, True, False),
]


@pytest.mark.parametrize(("family", "kind", "bits", "group", "symmetric", "act_order"), MODELS)
def test_converted_model(tmp_path, family, kind, bits, group, symmetric, act_order):
    """It loads by from_pretrained, has the source's weights and the dequantized model's logits and text, and saves again."""
    from transformers import AutoModelForCausalLM

    import lutq.hf  # noqa: F401

    make = maker(bits, group, symmetric, act_order)
    dense, state = write_checkpoint(tmp_path / "in", family, kind, config_of(kind, bits, group, symmetric, act_order), make)
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, LutLinear)}
    assert sorted(packed) == sorted(layer.name for layer in report.layers)
    assert all(isinstance(module, OrderedLinear) == (act_order and group != -1) for module in packed.values())
    for name, module in packed.items():
        assert torch.equal(module.dequantize(), dense.get_submodule(name).weight), name
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = dense(tokens).logits, model(tokens).logits
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert error < 1e-5, f"{error=}"
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens[:1], **options), dense.generate(tokens[:1], **options))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = [key for key in state if key.rpartition(".")[0] not in packed or key.endswith(".bias")]
    assert len(kept) > 3, kept
    assert all(torch.equal(stored[key], state[key]) and stored[key].dtype == state[key].dtype for key in kept)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, found)


def test_mixed_model_in_shards(tmp_path):
    """Layers that the source kept stay as they are; shards in, shards out; other files come along."""
    import lutq

    keep = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj")
    quantization = config_of("awq", 4) | {"modules_to_not_convert": ["down_proj", "o_proj"]}
    dense, state = write_checkpoint(
        tmp_path / "in", "llama", "awq", quantization, maker(4, dtype=torch.bfloat16), keep, torch.bfloat16, "1KB"
    )
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out", shard_bytes=20_000)
    assert sorted(report.kept) == sorted(keep)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {key: tensor for file in files for key, tensor in load_file(tmp_path / "out" / file).items()}
    for name in keep:
        assert torch.equal(found[f"{name}.weight"], state[f"{name}.weight"]), name
    assert found["model.norm.weight"].dtype == torch.bfloat16
    model = lutq.load(tmp_path / "out", device="cpu")
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["settings"] == {"method": "convert", "converted": quantization}
    assert config["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()
    assert "quantized by awq" in (tmp_path / "out" / "README.md").read_text()
    assert "lm_head" in report.summary()
    assert [path.name for path in tmp_path.iterdir()] == ["in", "out"] or len(list(tmp_path.iterdir())) == 2


def test_quantized_head_of_a_tied_model(tmp_path):
    """A packed head is no longer the embedding."""
    import lutq

    dense, _ = write_checkpoint(tmp_path / "in", "llama", "gptq", config_of("gptq", 4), maker(4), keep=(), tied=True)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = lutq.load(tmp_path / "out", device="cpu")
    assert isinstance(model.lm_head, LutLinear)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)


def test_decoding_engines_take_an_ordered_model(tmp_path):
    """The fast engine and the general one put the inputs of such layers into order, too."""
    import lutq
    from lutq.generate import Sampling, generate
    from lutq.tokens import load_tokenizer

    write_checkpoint(tmp_path / "in", "llama", "gptq", config_of("gptq", 4, 32, False, True), maker(4, act_order=True))
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    model = lutq.load(tmp_path / "out", device="cpu")
    tokenizer = load_tokenizer(tmp_path / "out")
    sampling = Sampling(12, 0.0, 1.0, 0, 1.0, 0)
    texts = {
        name: generate(model, tokenizer, "a", sampling, False, lambda piece: None, name).text
        for name in ("plain", "graph", "fast")
    }
    assert len(set(texts.values())) == 1, texts


@pytest.fixture
def gptq(tmp_path):
    """`gptq(change)`: a small checkpoint of format gptq after `change(state, quantization_config)`, its directory."""

    def write(change=lambda state, config: None, folder="in", **options):
        _, state = write_checkpoint(tmp_path / folder, "llama", "gptq", config_of("gptq", 4), maker(4, **options))
        raw = json.loads((tmp_path / folder / "config.json").read_text())
        change(state, raw["quantization_config"])
        (tmp_path / folder / "config.json").write_text(json.dumps(raw))
        state = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(state, tmp_path / folder / "model.safetensors", {"format": "pt"})
        return tmp_path / folder

    return write


Q = "model.layers.0.self_attn.q_proj"
BAD = {
    "quant_method 'bitsandbytes' is none": lambda state, config: config.update(quant_method="bitsandbytes"),
    "packing 'marlin' is none": lambda state, config: config.update(checkpoint_format="marlin"),
    "awq with the packing 'gemv' is none": lambda state, config: config.update(quant_method="awq", version="GEMV"),
    "auto-round with the packing 'auto_round:fp8'": lambda state, config: config.update(
        quant_method="auto-round", packing_format="auto_round:fp8"
    ),
    "quantizes activations to 8 bits": lambda state, config: config.update(quant_method="auto-round", act_bits=8),
    "group_size 'all'": lambda state, config: config.update(group_size="all"),
    "q_proj: its tensor qzeros is missing": lambda state, config: state.pop(f"{Q}.qzeros"),
    "q_proj: its tensor qweight is missing": lambda state, config: state.pop(f"{Q}.qweight"),
    "lacks the tensor model.norm.weight": lambda state, config: state.pop("model.norm.weight"),
    "q_proj: it has 7 bits and lutq converts 1 to 4, and 8": lambda state, config: state.update(
        {f"{Q}.qweight": torch.zeros(21, 96, dtype=torch.int32)}
    ),
    "qweight has shape [13, 96], but 96 x 96 weights of 4 bits need [12, 96]": lambda state, config: state.update(
        {f"{Q}.qweight": torch.zeros(13, 96, dtype=torch.int32)}
    ),
    "qweight has shape [2, 96], which fits no width": lambda state, config: state.update(
        {f"{Q}.qweight": torch.zeros(2, 96, dtype=torch.int32)}
    ),
    "scales has shape [3, 95]": lambda state, config: state.update({f"{Q}.scales": torch.zeros(3, 95).half()}),
    "qzeros has shape [4, 12]": lambda state, config: state.update({f"{Q}.qzeros": torch.zeros(4, 12, dtype=torch.int32)}),
    "g_idx names groups that the 3 scales": lambda state, config: state.update({f"{Q}.g_idx": state[f"{Q}.g_idx"] + 1}),
    "qweight is int64": lambda state, config: state.update({f"{Q}.qweight": state[f"{Q}.qweight"].long()}),
    "some programs read as a zero point of 0": lambda state, config: state.update(
        {f"{Q}.qzeros": torch.full((3, 12), -1, dtype=torch.int32)}
    ),
    "q_proj.bias is part of the quantization": lambda state, config: state.update({f"{Q}.bias": torch.ones(96)}),
    "act.scales is part of the quantization": lambda state, config: state.update(
        {"model.layers.0.mlp.act.scales": torch.ones(160)}
    ),
    "the data_type 'mx_fp'": lambda state, config: config.update(quant_method="auto-round", data_type="mx_fp"),
    "are no finite float16 numbers": lambda state, config: state.update({f"{Q}.scales": state[f"{Q}.scales"].float() / 3}),
    "such as 65536 in bfloat16": lambda state, config: state.update({f"{Q}.scales": torch.full((3, 96), 65536.0).bfloat16()}),
    "such as nan in float16": lambda state, config: state.update({f"{Q}.scales": torch.full((3, 96), torch.nan).half()}),
    "begin at multiples of 16 inputs": lambda state, config: state.update(
        {
            f"{Q}.g_idx": (torch.arange(96) // 16).int(),
            f"{Q}.scales": torch.ones(6, 96).half(),
            f"{Q}.qzeros": torch.zeros(6, 12, dtype=torch.int32),
        }
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_checkpoint_is_one_sentence(gptq, tmp_path, message):
    """Nothing is written, and the sentence names the layer and the tensor."""
    with pytest.raises(LutqError) as raised:
        convert_checkpoint(gptq(BAD[message]), tmp_path / "out")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"], "nothing is left behind"


def test_group_size_that_fits_nothing():
    """Without g_idx the number of scales has to fit."""
    made = Made(32, 160, 4, 32)
    tensors = made.tensors("gptq", g_idx=False) | {"scales": torch.ones(3, 32).half(), "qzeros": torch.zeros(3, 4).int()}
    with pytest.raises(LutqError, match="3 scales of a row fit no group size for 160 inputs"):
        convert_layer(tensors, config_of("gptq", 4, 32), 32, 160)


def test_bad_compressed_tensors():
    """What its config may say that lutq cannot keep."""
    made = Made(32, 96, 4)

    def attempt(change, tensors=None):
        config = config_of("compressed-tensors", 4)
        change(config, config["config_groups"]["group_0"])
        convert_layer(made.tensors("compressed-tensors") if tensors is None else tensors, config, 32, 96)

    for message, change in {
        "in the format 'int-quantized'": lambda config, group: config.update(format="int-quantized"),
        "int of 9 bits": lambda config, group: group["weights"].update(num_bits=9),
        "float of 4 bits": lambda config, group: group["weights"].update(type="float"),
        "quantizes activations too": lambda config, group: group.update(input_activations={"num_bits": 8}),
        "no config_groups": lambda config, group: config.update(config_groups={}),
        "compresses its cache": lambda config, group: config.update(kv_cache_scheme={"num_bits": 8}),
        "zeros of its weights": lambda config, group: config.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "weight_packed has shape": lambda config, group: group["weights"].update(num_bits=2),
    }.items():
        with pytest.raises(LutqError, match=message):
            attempt(change)
    tensors = made.tensors("compressed-tensors")
    tensors.pop("weight_zero_point")
    with pytest.raises(LutqError, match="weight_zero_point is missing"):
        attempt(lambda config, group: None, tensors)
    tensors = made.tensors("compressed-tensors") | {"weight_shape": torch.tensor([32, 95])}
    with pytest.raises(LutqError, match="weight_shape says"):
        attempt(lambda config, group: None, tensors)
    seven = {"weight_packed": torch.zeros(32, 21).int(), "weight_scale": torch.ones(32, 3).half()}
    with pytest.raises(LutqError, match="7 bits and lutq converts 1 to 4, and 8"):
        attempt(lambda config, group: group["weights"].update(num_bits=7, symmetric=True), seven)


def test_a_bias_of_zeros_is_left_out(gptq, tmp_path):
    """AutoGPTQ gave every layer a bias; one of zeros changes nothing and the model has no place for it."""
    report = convert_checkpoint(gptq(lambda state, config: state.update({f"{Q}.bias": torch.zeros(96)})), tmp_path / "out")
    assert report.ignored == [f"{Q}.bias"]


def test_config_in_a_file_of_its_own(gptq, tmp_path):
    """AutoGPTQ's quantize_config.json."""
    folder = gptq()
    raw = json.loads((folder / "config.json").read_text())
    quantization = raw.pop("quantization_config")
    quantization.pop("quant_method")
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LutqError, match="is not quantized"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    assert len(convert_checkpoint(folder, tmp_path / "out").layers) == 7


def test_output_folder(gptq, tmp_path):
    """An earlier output is replaced only when asked for, and what is not lutq's never."""
    folder, out = gptq(), tmp_path / "out"
    convert_checkpoint(folder, out)
    with pytest.raises(LutqError, match="already holds a quantized model: add --overwrite"):
        convert_checkpoint(folder, out)
    convert_checkpoint(folder, out, overwrite=True)
    with pytest.raises(LutqError, match="exists and is not an output"):
        convert_checkpoint(folder, folder, overwrite=True)
    with pytest.raises(LutqError, match="cannot write"):
        convert_checkpoint(folder, folder / "config.json" / "out")
    with pytest.raises(LutqError, match="no name of its own"):
        convert_checkpoint(folder, "..")
    with pytest.raises(LutqError, match="is lutq's own already"):
        convert_checkpoint(out, tmp_path / "other")
    with pytest.raises(LutqError, match="is not quantized"):
        convert_checkpoint("opt-tiny", tmp_path / "other")


def test_an_interrupted_run_leaves_nothing(gptq, tmp_path, monkeypatch):
    """Neither an output nor a folder to clean up."""
    folder = gptq()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lutq.convert.publish", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ordered_linear_refuses_another_width():
    """As LutLinear does."""
    made = Made(32, 64, 4, 32, act_order=True)
    stored, layer = convert_layer(made.tensors("gptq"), config_of("gptq", 4), 32, 64)
    module = OrderedLinear(64, 32, layer)
    module.load_state_dict(stored)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x).double(), x.double() @ made.weight().T, atol=1e-4, rtol=1e-4)
    with pytest.raises(LutqError, match="x has 63 features and this layer takes 64"):
        module(x[:, :63])


def test_processes_refuse_an_ordered_model(gptq, tmp_path):
    """A part of the inputs has no order of its own; such a model is for one process."""
    from lutq.parallel.load import load_part
    from lutq.parallel.ranks import ALONE

    convert_checkpoint(gptq(act_order=True), tmp_path / "out")
    with pytest.raises(LutqError, match="q_proj has inputs in an order of their own"):
        load_part(tmp_path / "out", ALONE, torch.device("cpu"), torch.float32)


def test_command(gptq, tmp_path, lutq_command):
    """`lutq convert`, what `lutq info` says then, and one sentence for what is no quantized model."""
    folder = gptq(act_order=True)
    result = lutq_command("convert", folder, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "activation order  7 layers put their inputs into order first" in result.stdout, result.stdout
    assert "every weight is what it was" in result.stdout, result.stdout
    found = lutq_command("info", tmp_path / "out", "--device", "cpu").stdout
    for text in (result.stdout, found):
        assert "5.083" in text, f"4 bits, a scale and a zero point for 32 inputs, and the order: {text}"
    assert "method convert" in found, found
    result = lutq_command("convert", "opt-tiny", "--out", tmp_path / "other")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "is not quantized" in result.stderr
