"""What lutq reads off a config: the Linear layers, where they are, and which tensors are tied."""

import pytest
from conftest import COMMON, MODELS, build_model
from transformers import AutoConfig

from lutq.errors import LutqError
from lutq.source import load_config
from lutq.structure import read_structure

OPT_LAYERS = [f"self_attn.{name}_proj" for name in "kvq"] + ["self_attn.out_proj", "fc1", "fc2"]
LLAMA_LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
SIZES = {  # module inside a block -> (N, K)
    "opt": dict.fromkeys(OPT_LAYERS[:4], (96, 96)) | {"fc1": (172, 96), "fc2": (96, 172)},
    "llama": {"self_attn.q_proj": (96, 96), "self_attn.k_proj": (32, 96), "mlp.down_proj": (96, 172), "mlp.up_proj": (172, 96)},
    "llama-tied": {"self_attn.k_proj": (48, 96)},
    "qwen2": {"self_attn.q_proj": (100, 100), "self_attn.v_proj": (20, 100), "mlp.gate_proj": (172, 100)},
    "qwen3": {"self_attn.q_proj": (120, 96), "self_attn.k_proj": (40, 96), "self_attn.o_proj": (96, 120)},
    "mistral": {"self_attn.q_proj": (144, 96), "self_attn.k_proj": (48, 96), "self_attn.o_proj": (96, 144)},
    "opt-postnorm": {"fc1": (172, 96), "fc2": (96, 172)},
}
TIED = {
    "opt": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "opt-postnorm": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "llama-tied": {"lm_head.weight": "model.embed_tokens.weight"},
}


def test_linears_places_tied(tiny, family):
    structure = read_structure(load_config(tiny(family)))
    is_opt = family.startswith("opt")
    blocks = "model.decoder.layers" if is_opt else "model.layers"
    inside = [f"{blocks}.{i}.{layer}" for i in range(2) for layer in (OPT_LAYERS if is_opt else LLAMA_LAYERS)]
    outside = ["model.decoder.project_out", "model.decoder.project_in"] if family == "opt-postnorm" else []
    places = {name: linear.place for name, linear in structure.linears.items()}
    expected = dict.fromkeys(inside, "block") | dict.fromkeys(outside, "outside") | {"lm_head": "head"}
    assert places == expected, f"{family=} {places}"
    for layer, size in SIZES[family].items():
        linear = structure.linears[f"{blocks}.1.{layer}"]
        assert linear[:2] == size, f"{family=} {layer=} {linear}"
    assert structure.tied == TIED.get(family, {}), f"{family=} {structure.tied}"
    assert structure.prefix == "model.", f"{family=} {structure.prefix}"


def test_tensors_are_those_of_the_model(family):
    kind, fields = MODELS[family]
    structure = read_structure(AutoConfig.for_model(kind, **fields))
    shapes = {key: tuple(tensor.shape) for key, tensor in build_model(family).state_dict().items()}
    assert structure.tensors == shapes, f"{family=} {set(structure.tensors.items()) ^ set(shapes.items())}"
    assert list(structure.tensors) == list(shapes), f"{family=}: not in the model's order"


def test_head_has_the_size_of_the_embedding(tiny, family):
    structure = read_structure(load_config(tiny(family)))
    hidden = {"opt-postnorm": 72, "qwen2": 100}.get(family, 96)
    head = structure.linears["lm_head"]
    assert head[:2] == (4096, hidden), f"{family=} {head}"


SMALL = COMMON | {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
UNSUPPORTED = {
    "gpt2": COMMON | {"n_embd": 64, "n_layer": 2, "n_head": 4},  # Conv1D, not Linear
    "mixtral": SMALL | {"num_key_value_heads": 2, "num_local_experts": 4},  # fused experts
    "bert": SMALL,
    "t5": {"vocab_size": 4096, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16},
}


@pytest.mark.parametrize("kind", list(UNSUPPORTED))
def test_unsupported_architectures(kind):
    with pytest.raises(LutqError, match="lutq quantizes OPT, LLaMA, Mistral, Qwen2, Qwen3 and models built like them"):
        read_structure(AutoConfig.for_model(kind, **UNSUPPORTED[kind]))
