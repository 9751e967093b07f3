"""Models with random weights, made where they will be read: quantized layers directly in kernel order (lutq/prepack.py).

They have the sizes, the bytes and the data flow of real ones, and numbers that neither overflow nor vanish. Nothing is ever
held unquantized except embeddings and head.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from lutq.config import LayerConfig
from lutq.decode.shape import shape_of
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.pack import Packed
from lutq.parallel.ranks import ALONE, Ranks
from lutq.parallel.split import part_layer, split_linears, tie_head
from lutq.paths import shipped
from lutq.prepack import UNIT, panels, units
from lutq.structure import decoder_blocks, skeleton

SPREAD = 13 / 12  # the mean square of a scale that is even between 0.5 and 1.5


def read_config(name: str) -> Any:
    """The transformers config of a shape: a JSON file, or the name of one in configs/models. Raises LutqError."""
    from transformers import AutoConfig

    folder = shipped("configs") / "models"
    path = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise LutqError(f"there is no shape {name!r}: give a JSON file, or one of {known}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LutqError(f"{path} is no model config of transformers with a model_type: {error}") from error


def record_bytes(layer: LayerConfig) -> int:
    """Of scales with offsets or zero points, of a tile and a group."""
    return 32 * (layer.bits + layer.offsets) if layer.grid == "bcq" else 32 + 16 * layer.offsets


def groups(K: int, layer: LayerConfig) -> int:
    """Groups of the inputs of whole units."""
    return -(-units(K) * UNIT // (layer.group or units(K) * UNIT))


def layer_bytes(N: int, K: int, layer: LayerConfig | None) -> int:
    """Of a matrix [N, K] in kernel order; of an unquantized one in fp16."""
    if layer is None:
        return 2 * N * K
    return panels(N) * 4 * (units(K) * 512 * layer.bits + groups(K, layer) * record_bytes(layer))


def random_layer(N: int, K: int, layer: LayerConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and records of a random matrix; on average |W x| / sqrt(N) is |x| / sqrt(K)."""
    codes = torch.randint(-(2**31), 2**31, (panels(N), units(K), 4, 128 * layer.bits), device=device, dtype=torch.int32)
    place = (panels(N), groups(K, layer), 4)
    square = layer.bits if layer.grid == "bcq" else (4**layer.bits - 1) / 6  # of a weight, in scales
    count = 16 * (layer.bits if layer.grid == "bcq" else 1)
    scales = torch.rand(*place, count, device=device).add_(0.5).mul_(1 / math.sqrt(K * square * SPREAD)).half()
    parts = [scales.view(torch.uint8)]
    if layer.offsets and layer.grid == "bcq":
        parts.append(torch.randn(*place, 16, device=device).div_(K).half().view(torch.uint8))
    elif layer.offsets:
        parts.append(torch.randint(0, 2**layer.bits, (*place, 16), device=device, dtype=torch.uint8))
    return codes, torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def synthetic_linear(linear: torch.nn.Linear, layer: LayerConfig, device: torch.device) -> LutLinear:
    """A random layer of the size of one on the meta device."""
    module = LutLinear(linear.in_features, linear.out_features, layer, linear.bias, device="meta")
    module.kernel_codes, module.kernel_records = random_layer(linear.out_features, linear.in_features, layer, device)
    for name in Packed._fields:
        module._buffers[name] = None
    return module


def synthetic_model(
    config: Any, layer: LayerConfig | None, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE
) -> Any:
    """A random model of a transformers config, its blocks quantized as `layer` says, or, for None, in `dtype` like the rest.

    With several ranks: one rank's part, whose layers have the sizes of what it would read of a checkpoint (lutq/parallel).
    """
    model = skeleton(config)
    blocks = decoder_blocks(model)
    inputs = {name: module.in_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = split_linears(model, shape_of(config, ranks.world), ranks.rank, {}) if ranks.world > 1 else {}
    for name, linear in list(model.named_modules()):
        if layer is not None and isinstance(linear, torch.nn.Linear) and name.startswith(blocks + "."):
            own = part_layer(layer, parts[name], inputs[name]) if parts else layer
            model.set_submodule(name, synthetic_linear(linear, own, device))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = torch.nn.Parameter(random_parameter(module, name, dtype, device), requires_grad=False)
        if hasattr(module, "original_inv_freq"):  # a rotary embedding, which computes what it holds
            made = type(module)(config).to(device)
            module._buffers.update(made._buffers)
    if parts:
        tie_head(model, parts)
    else:
        model.tie_weights()
    return model.eval()


def random_parameter(module: torch.nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """1 for the weight of a norm, otherwise random: matrices keep lengths on average, biases are small."""
    shape = module._parameters[name].shape
    if len(shape) == 1:
        if name == "weight":
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, 1 / math.sqrt(shape[1]))
