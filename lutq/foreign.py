"""Layers that other programs quantized: where each layout keeps its integers, and how to get at them.

All mean W[n,k] = scales[n,j] * (u[n,k] - zero_points[n,j]), j being the group of input k, u and zero points of b bits. Words are
int32; their fields follow one another from the lowest bit of the first word on, across word boundaries.

    gptq                 qweight [K b/32, N], qzeros [G, N b/32], scales [G, N], g_idx [K]: the group of each input
                         A column of qweight is the fields of a row of W; 3 bits take 3 words for 32 inputs. Checkpoints of
                         format `gptq` store zero points minus one, those of `gptq_v2` as they are.
    awq                  qweight [K, N/8], qzeros [G, N/8], scales [G, N]; 4 bits
                         The fields of a word are the outputs 0 2 4 6 1 3 5 7 of eight.
    compressed-tensors   weight_packed [N, K b/32], weight_zero_point [N b/32, G], weight_scale [N, G], weight_shape, weight_g_idx
                         Integers are signed and stored plus 2^(b-1); without zero points that is the zero point. Earlier
                         versions put ten fields of 3 bits into a word, so that none crosses into the next.

Written down in AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, `pack` and `forward`) and GPTQModel
(gptqmodel/utils/model.py, `convert_gptq_v1_to_v2_format_module`); AutoAWQ (awq/modules/linear/gemm.py and
awq/utils/packing_utils.py); compressed-tensors (compressors/pack_quantized, formerly quantized_compressors/pack_quantized.py).
AutoRound writes the first two (auto_round/export/export_to_autoround/export.py).
"""

import math
from typing import Any, NamedTuple

import torch

from lutq.errors import LutqError
from lutq.pack import unpack_bits

AWQ_FIELD = [0, 4, 1, 5, 2, 6, 3, 7]  # which field of a word holds output 0, 1, ... of eight
METHODS = "GPTQ, AWQ, AutoRound and compressed-tensors"
AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


class Scheme(NamedTuple):
    """What a config says of some layers. bits: None where the shapes tell. group: 0 is the whole row."""

    bits: int | None
    group: int
    symmetric: bool = False


class Layout(NamedTuple):
    """How the layers of a checkpoint are stored. names: of a layer's tensors, the integers first, as `Part` has them."""

    kind: str
    names: dict[str, str]
    schemes: list[Scheme]


class Shapes(NamedTuple):
    """A layer as its tensors' shapes show it. in_word: fields of a word where none crosses into the next, else 0."""

    bits: int
    G: int
    in_word: int = 0


PACKED = {"integers": "qweight", "zeros": "qzeros", "scales": "scales"}
COMPRESSED = {
    "integers": "weight_packed",
    "zeros": "weight_zero_point",
    "scales": "weight_scale",
    "shape": "weight_shape",
    "groups": "weight_g_idx",
}


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout that a `quantization_config` describes. Raises LutqError for one that lutq cannot convert."""
    method = str(config.get("quant_method", "unknown")).replace("_", "-")
    if method == "compressed-tensors":
        return Layout("compressed-tensors", COMPRESSED, compressed_schemes(config))
    if method == "gptq":
        kind = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        kind = "marlin" if config.get("is_marlin_format") else kind
        known = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    elif method == "awq":
        kind = str(config.get("version") or config.get("checkpoint_format") or "gemm").lower()
        known = {"gemm": "awq"}
    elif method in ("auto-round", "intel/auto-round"):
        kind, known = str(config.get("packing_format") or config.get("backend") or "none"), AUTO_ROUND
        if (config.get("act_bits") or 16) < 16:
            raise LutqError(f"the source quantizes activations to {config['act_bits']} bits: lutq quantizes weights only")
        if not str(config.get("data_type", "int")).startswith("int"):
            raise LutqError(f"the source has the data_type {config['data_type']!r}: lutq can convert integers")
    else:
        raise LutqError(f"quant_method {method!r} is none that lutq can convert: it takes {METHODS}")
    if kind not in known:
        raise LutqError(f"{method} with the packing {kind!r} is none that lutq can convert: it takes {', '.join(known)}")
    names = PACKED if known[kind] == "awq" else PACKED | {"groups": "g_idx"}
    group = config.get("group_size", config.get("q_group_size"))
    return Layout(known[kind], names, [Scheme(None, group_of(group))])


def group_of(group: Any) -> int:
    """A config's group size, 0 for whole rows. Raises LutqError for what is no number."""
    if group is not None and type(group) is not int:
        raise LutqError(f"quantization_config has the group_size {group!r}: lutq can convert groups of inputs and whole rows")
    return max(0, group or 0)


def compressed_schemes(config: dict[str, Any]) -> list[Scheme]:
    """What compressed-tensors says in `config_groups`. Raises LutqError for what are no integer weights alone."""
    schemes = []
    for name, group in (config.get("config_groups") or {}).items():
        group = group if isinstance(group, dict) else {}
        kind, weights = group.get("format") or config.get("format"), group.get("weights") or {}
        if kind != "pack-quantized" or weights.get("type", "int") != "int" or weights.get("num_bits") not in range(1, 9):
            words = f"{weights.get('type', 'int')} of {weights.get('num_bits')} bits in the format {kind!r}"
            raise LutqError(f"config_groups.{name} has {words}: lutq can convert int of 1 to 4 or 8 bits in 'pack-quantized'")
        if group.get("input_activations") or group.get("output_activations"):
            raise LutqError(f"config_groups.{name} quantizes activations too: lutq quantizes weights only")
        schemes.append(Scheme(weights["num_bits"], group_of(weights.get("group_size")), weights.get("symmetric", True)))
    if not schemes:
        raise LutqError("quantization_config has no config_groups: give a checkpoint as compressed-tensors saves it")
    if config.get("kv_cache_scheme") or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise LutqError("the source compresses its cache or zeros of its weights too: lutq quantizes weights only")
    return schemes


def check_parts(layout: Layout, keys: dict[str, str]) -> None:
    """Raise LutqError unless a layer has all tensors that its layout needs, given the names of those it has by part."""
    needed = ("integers", "scales", *(() if layout.kind == "compressed-tensors" else ("zeros",)))
    missing = [layout.names[part] for part in needed if part not in keys]
    if missing:
        raise LutqError(f"its tensor {missing[0]} is missing: copy or download the checkpoint again")


def check_zeros(layout: Layout, keys: dict[str, str], found: Shapes) -> None:
    """Raise LutqError where a layer of compressed-tensors lacks the zero points that its config says it has."""
    symmetric = all(scheme.symmetric for scheme in layout.schemes if scheme.bits in (None, found.bits))
    if "zeros" not in keys and not symmetric:
        raise LutqError(f"its tensor {layout.names['zeros']} is missing: copy or download the checkpoint again")


def words(count: int, bits: int, in_word: int = 0) -> int:
    """Words that hold so many fields."""
    return -(-count // in_word) if in_word else -(-count * bits // 32)


def shapes_of(layout: Layout, shapes: dict[str, tuple[int, ...]], N: int, K: int) -> Shapes:
    """Bits and groups of a layer W [N, K] by the shapes of its tensors. Raises LutqError where they do not fit together."""
    integers, scales, found = shapes["integers"], shapes["scales"], None
    if layout.kind == "compressed-tensors":
        G = scales[-1] if len(scales) == 2 else 1
        fitting = {Shapes(scheme.bits, G, at) for scheme in layout.schemes for at in (0, 32 // scheme.bits)}
        fitting = {shape._replace(in_word=0) if 32 % shape.bits == 0 else shape for shape in fitting}
        fitting = [shape for shape in fitting if integers == (N, words(K, shape.bits, shape.in_word))]
        found = fitting[0] if len(fitting) == 1 else None
    elif len(integers) == len(scales) == 2:
        packed, count = (integers[1], N) if layout.kind == "awq" else (integers[0], K)
        found = Shapes(32 * packed // count, scales[0])
    if found is None or not 1 <= found.bits <= 8:
        raise LutqError(f"{layout.names['integers']} has shape {list(integers)}, which fits no width of {N} x {K} weights")
    if found.bits not in (1, 2, 3, 4, 8) or (layout.kind == "awq" and found.bits != 4):
        widths = "4 of AWQ" if layout.kind == "awq" else "1 to 4, and 8"
        raise LutqError(f"it has {found.bits} bits and lutq converts {widths}: quantize the original model instead")
    for part, expected in expected_shapes(layout, found, N, K).items():
        if part in shapes and shapes[part] not in expected:
            wanted = " or ".join(str(list(shape)) for shape in expected)
            shape = list(shapes[part])
            raise LutqError(f"{layout.names[part]} has shape {shape}, but {N} x {K} weights of {found.bits} bits need {wanted}")
    return found


def expected_shapes(layout: Layout, found: Shapes, N: int, K: int) -> dict[str, list[tuple[int, ...]]]:
    """Part -> the shapes it may have."""
    bits, G, in_word = found
    if layout.kind == "compressed-tensors":
        zeros = [(words(N, bits, in_word), G), (N, G), (1,), ()]
        return {"zeros": zeros, "scales": [(N, G), (1,), ()], "shape": [(2,)], "groups": [(K,)]}
    integers = (K, words(N, bits)) if layout.kind == "awq" else (words(K, bits), N)
    return {"integers": [integers], "zeros": [(G, words(N, bits))], "scales": [(G, N)], "groups": [(K,)]}


def groups_of(layout: Layout, found: Shapes, K: int, g_idx: torch.Tensor | None) -> torch.Tensor:
    """Int64 [K]: the group of each input. Raises LutqError where the group size is not to be told."""
    if g_idx is not None and not (layout.kind == "compressed-tensors" and (g_idx < 0).any()):  # there -1 is "none"
        if g_idx.numel() and not 0 <= g_idx.min() <= g_idx.max() < found.G:
            raise LutqError(f"{layout.names['groups']} names groups that the {found.G} scales of a row do not have")
        return g_idx.long()
    sizes = {scheme.group or K for scheme in layout.schemes if scheme.bits in (None, found.bits)}
    fitting = [size for size in sizes if -(-K // size) == found.G] or ([K // found.G] if found.G and K % found.G == 0 else [])
    if len(fitting) != 1:
        raise LutqError(f"{found.G} scales of a row fit no group size for {K} inputs")
    return torch.arange(K) // fitting[0]


def fields(packed: torch.Tensor, bits: int, count: int, in_word: int = 0) -> torch.Tensor:
    """Int32 [R, words] -> bool [R, count, bits], the lowest bit first; `in_word` fields in a word, or across words for 0."""
    if not in_word:
        return unpack_bits(packed, count * bits).unflatten(-1, (count, bits))
    each = unpack_bits(packed, 32 * packed.shape[1]).unflatten(-1, (-1, 32))[..., : in_word * bits]
    return each.unflatten(-1, (in_word, bits)).flatten(1, 2)[:, :count]


def awq_fields(packed: torch.Tensor) -> torch.Tensor:
    """Int32 [R, N/8] in AWQ's order -> bool [R, N, 4]."""
    return fields(packed, 4, 8 * packed.shape[1]).unflatten(1, (-1, 8))[:, :, AWQ_FIELD].flatten(1, 2)


def numbers(found: torch.Tensor) -> torch.Tensor:
    """Fields bool [..., b] as uint8 [...]."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (found * places[: found.shape[-1]]).sum(-1, dtype=torch.uint8)


def integers_of(layout: Layout, packed: torch.Tensor, found: Shapes, K: int, rows: slice) -> torch.Tensor:
    """Bits of u, bool [rows, K, b] with the lowest first, for rows of W from a multiple of 8 on."""
    if layout.kind == "compressed-tensors":
        return fields(packed[rows], found.bits, K, found.in_word)
    if layout.kind == "awq":
        return awq_fields(packed[:, rows.start // 8 : rows.stop // 8]).transpose(0, 1)
    return fields(packed[:, rows].T.contiguous(), found.bits, K)


def grids_of(layout: Layout, tensors: dict[str, torch.Tensor], found: Shapes, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales as stored and zero points uint8, [N, G] each, from a layer's tensors by part.

    Raises LutqError for zero points that programs do not agree about.
    """
    scales = tensors["scales"]
    if layout.kind == "compressed-tensors":
        return scales.expand(N, found.G) if scales.dim() < 2 else scales, compressed_zeros(tensors, found, N)
    if layout.kind == "awq":
        return scales.T, numbers(awq_fields(tensors["zeros"])).T
    zeros = numbers(fields(tensors["zeros"], found.bits, N)).T
    if layout.kind == "gptq":
        most = 2**found.bits - 1
        if (zeros == most).any():
            raise LutqError(
                f"qzeros holds {most}, which some programs read as a zero point of 0 and others as {most + 1} "
                "(checkpoint_format gptq): save the source as gptq_v2"
            )
        zeros = zeros + 1
    return scales.T, zeros


def compressed_zeros(tensors: dict[str, torch.Tensor], found: Shapes, N: int) -> torch.Tensor:
    """Zero points uint8 [N, G] of compressed-tensors, as the stored integers count: packed, int8, or none."""
    zeros, middle = tensors.get("zeros"), 2 ** (found.bits - 1)
    if zeros is None:
        return torch.full((N, found.G), middle, dtype=torch.uint8)
    if zeros.dtype == torch.int32:
        return numbers(fields(zeros.T.contiguous(), found.bits, N, found.in_word)).T
    signed = zeros.expand(N, found.G) if zeros.dim() < 2 else zeros
    return (signed.short() + middle).to(torch.uint8)


def grouping(groups: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """How lutq can store inputs of these groups, int64 [K]: in consecutive groups of g, a multiple of 32, or 0 for the row.

    Returns g; which source group each is, int64 [G']; and, where inputs of a group are apart (activation order), the inputs
    sorted by group, int64 [K], else None. A g smaller than the source's is taken where only that leaves inputs in their order.
    Raises LutqError where groups do not consist of whole words of 32 inputs.
    """
    for order in (None, groups.argsort(stable=True)):
        arranged = groups if order is None else groups[order]
        starts = (arranged[1:] != arranged[:-1]).nonzero().flatten() + 1
        g = math.gcd(*starts.tolist())
        if g % 32 == 0:
            return g, arranged[:: g or len(groups)], order
    raise LutqError(f"its groups begin at multiples of {g} inputs and lutq's at multiples of 32: quantize the original model")
