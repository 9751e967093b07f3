"""What the fast engine has to know of a model: sizes, activation, rotation, all read from its transformers config."""

from dataclasses import dataclass
from typing import Any

import torch

from lutq.errors import LutqError

ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh"}
ROTATIONS = ("default", "linear", "llama3", "yarn")  # angles that depend on the position alone


class RefusedError(LutqError):
    """An engine does not take a model, for a reason, and another may."""

    def __init__(self, engine: str, reason: str) -> None:
        other = {"fast": "graph", "graph": "plain"}[engine]
        super().__init__(f"the {engine} engine does not take this model: {reason}; use --engine {other}")
        self.reason = reason


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. With `world` ranks, each has whole heads and an equal share of the inner features; where there are fewer
    kv heads than ranks, several have the same one. Shares of the vocabulary are rounded up.

    heads, kv_heads, inner and vocabulary are of the whole model; `longest` is its maximum of positions.
    """

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    layers: int
    vocabulary: int
    longest: int
    activation: str
    gated: bool
    world: int = 1

    @property
    def own_heads(self) -> int:
        """Query heads of a rank."""
        return self.heads // self.world

    @property
    def own_kv_heads(self) -> int:
        """Heads of keys and values of a rank."""
        return max(1, self.kv_heads // self.world)

    @property
    def own_inner(self) -> int:
        """Features between the two products of a feed-forward block, of a rank."""
        return self.inner // self.world

    @property
    def own_vocabulary(self) -> int:
        """Tokens whose logits a rank computes."""
        return -(-self.vocabulary // self.world)

    def cache_bytes(self, batch: int, capacity: int, itemsize: int = 2) -> int:
        """Of keys and values of `capacity` tokens, of a rank."""
        return 2 * self.layers * batch * self.own_kv_heads * capacity * self.head_size * itemsize


def refusal(config: Any) -> str | None:
    """Why the fast engine does not take a model of this config, in words; None if it does."""
    kind = config.model_type
    if kind not in ("opt", "llama"):
        return f"it is written for OPT and LLaMA, not for model type {kind!r}"
    activation = config.activation_function if kind == "opt" else config.hidden_act
    if activation not in ACTIVATIONS:
        return f"it has no activation {activation!r}"
    if kind == "opt":
        if not config.do_layer_norm_before:
            return "the model normalizes after its blocks instead of before"
        if config.word_embed_proj_dim != config.hidden_size:
            return "the model projects its embeddings"
        if config._remove_final_layer_norm or not config.layer_norm_elementwise_affine:
            return "the model lacks some of its norms"
        return None
    rotation = config.rope_parameters.get("rope_type", "default")
    if rotation not in ROTATIONS:
        return f"the model's rotation {rotation!r} depends on the length of the text"
    return None


def shape_of(config: Any, world: int = 1) -> Shape:
    """The sizes. Raises RefusedError for a model the fast engine does not take, LutqError if `world` ranks cannot share it."""
    reason = refusal(config)
    if reason:
        raise RefusedError("fast", reason)
    opt = config.model_type == "opt"
    heads = config.num_attention_heads
    shape = Shape(
        family=config.model_type,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=heads if opt else config.num_key_value_heads,
        head_size=(None if opt else getattr(config, "head_dim", None)) or config.hidden_size // heads,
        inner=config.ffn_dim if opt else config.intermediate_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        longest=config.max_position_embeddings,
        activation=ACTIVATIONS[config.activation_function if opt else config.hidden_act],
        gated=not opt,
        world=world,
    )
    for name in ("heads", "kv_heads", "inner"):
        if getattr(shape, name) % world and not (name == "kv_heads" and world % shape.kv_heads == 0):
            raise LutqError(f"{getattr(shape, name)} {name} cannot be shared by {world} ranks: use a divisor of it")
    return shape


def rotation_of(config: Any, capacity: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosine and sine, fp32 [capacity, head size / 2] each, as transformers computes them; None for a model without rotation."""
    if config.model_type == "opt":
        return None
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("cpu"):
        module = LlamaRotaryEmbedding(config).to(device)
    positions = torch.arange(capacity, device=device)[None]
    angles = module(torch.zeros((), dtype=torch.float32, device=device), positions)
    half = angles[0].shape[-1] // 2
    cosine, sine = (values[0, :, :half].float().contiguous() for values in angles)
    return cosine, sine
