"""The weights of an OPT or LLaMA model as the fast engine reads them: views of what the transformers model holds."""

from typing import Any, NamedTuple

import torch

from lutq.decode.fusion import Norm
from lutq.decode.products import Parts, Product, product_of
from lutq.decode.shape import RefusedError, Shape, rotation_of, shape_of

POSITION_OFFSET = 2  # of OPT's learned positions


class Layer(NamedTuple):
    """A decoder block. `inward` has the parts q, k, v; `up` has gate and up, or one part."""

    attention_norm: Norm
    inward: Parts
    out: Product
    norm: Norm
    up: Parts
    down: Product


class Weights(NamedTuple):
    """A model. table [vocabulary, hidden]; learned positions [positions, hidden] or None; head: the product that gives logits."""

    shape: Shape
    config: Any
    table: torch.Tensor
    learned: torch.Tensor | None
    layers: list[Layer]
    norm: Norm
    head: Product

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of the cache."""
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.table.device

    @property
    def nbytes(self) -> int:
        """What a step reads of the weights."""
        products = sum(layer.inward.nbytes + layer.out.nbytes + layer.up.nbytes + layer.down.nbytes for layer in self.layers)
        return products + self.head.nbytes


def norm_of(module: torch.nn.Module, dtype: torch.dtype) -> Norm:
    """A norm of transformers' OPT (LayerNorm) or LLaMA (RMSNorm)."""
    bias = getattr(module, "bias", None)
    eps = module.eps if isinstance(module, torch.nn.LayerNorm) else module.variance_epsilon
    weight, bias = (None if tensor is None else tensor.detach().to(dtype).contiguous() for tensor in (module.weight, bias))
    return Norm(weight, bias, eps, isinstance(module, torch.nn.LayerNorm))


@torch.inference_mode(False)  # what stays in the model must be of use outside inference mode
@torch.no_grad()
def weights_of(model: Any, world: int = 1) -> Weights:
    """The weights of a transformers model, joined where they are read together (lutq/decode/products.py); of one that is
    a rank's part of `world`, its part.

    Raises RefusedError for a model that the fast engine does not take.
    """
    shape = shape_of(model.config, world)
    opt = shape.family == "opt"
    body = model.model.decoder if opt else model.model
    table = body.embed_tokens.weight.detach()
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise RefusedError("fast", f"it is on {len(devices)} devices, {', '.join(sorted(devices))}")
    layers = []
    for block in body.layers:
        attention = block.self_attn
        queries = [attention.q_proj, attention.k_proj, attention.v_proj]
        if opt:
            norms, out, up, down = (
                (block.self_attn_layer_norm, block.final_layer_norm),
                attention.out_proj,
                [block.fc1],
                block.fc2,
            )
        else:
            norms, out = (block.input_layernorm, block.post_attention_layernorm), attention.o_proj
            up, down = [block.mlp.gate_proj, block.mlp.up_proj], block.mlp.down_proj
        first, second = (norm_of(norm, table.dtype) for norm in norms)
        layers.append(Layer(first, Parts(queries), product_of(out), second, Parts(up), product_of(down)))
    learned = body.embed_positions.weight.detach()[POSITION_OFFSET:] if opt else None
    last = norm_of(body.final_layer_norm if opt else body.norm, table.dtype)
    return Weights(shape, model.config, table, learned, layers, last, product_of(model.get_output_embeddings()))


def rotation(weights: Weights, capacity: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosine and sine of a model's rotation, fp32 [capacity, head size / 2], or None."""
    return rotation_of(weights.config, capacity, weights.device)
