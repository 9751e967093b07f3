"""Which part of a Linear layer W [N, K] of OPT or LLaMA belongs to which rank.

    q_proj, k_proj, v_proj         rows: whole heads, in order; where there are fewer kv heads than ranks, ranks share one
    gate_proj, up_proj, fc1        rows: equal shares of the inner features
    o_proj, out_proj               columns: those of the rank's heads; the bias is rank 0's
    down_proj, fc2                 columns: those of the rank's inner features; the bias is rank 0's
    lm_head                        rows: equal shares of the vocabulary, the last of which overlap where it cannot be divided

The head is always cut: a step reads all of it, 1.2 GB in OPT-175B, and ranks that gather the logits need not be sent the token of
rank 0. The embedding never is: a step reads one row of it, so that only memory would be saved, for one more sum per token. A tied
head is a view of everyone's embedding.

Columns of a packed layer are cut between words of 32 inputs. Where a cut falls inside a group, groups are made smaller, to their
largest common divisor with the share, and keep their numbers: the weights stay the same bit for bit.
"""

import math
from typing import Any, NamedTuple

import torch

from lutq.config import LayerConfig
from lutq.decode.shape import Shape
from lutq.errors import LutqError
from lutq.linear import LutLinear

WORD = 32
KINDS = {"q_proj": "heads", "k_proj": "kv", "v_proj": "kv", "gate_proj": "inner", "up_proj": "inner", "fc1": "inner"}
KINDS |= {"lm_head": "vocabulary"}
MIXING = {"o_proj": "heads", "out_proj": "heads", "down_proj": "inner", "fc2": "inner"}  # cut by columns


class Part(NamedTuple):
    """Rows and columns of W, each (begin, end)."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def outputs(self) -> int:
        """How many rows."""
        return self.rows[1] - self.rows[0]

    @property
    def inputs(self) -> int:
        """How many columns."""
        return self.columns[1] - self.columns[0]


def share(shape: Shape, rank: int) -> tuple[int, int]:
    """First token, and how many, of a rank's part of the vocabulary: equally many for all, so that they can be gathered."""
    return min(rank * shape.own_vocabulary, shape.vocabulary - shape.own_vocabulary), shape.own_vocabulary


def part_of(name: str, N: int, K: int, shape: Shape, rank: int) -> Part:
    """The part of the layer `name` [N, K] that is a rank's; all of it for layers that are not cut."""
    kind = name.rpartition(".")[2]
    ranges = {
        "heads": (rank * shape.own_heads * shape.head_size, shape.own_heads * shape.head_size),
        "kv": (rank * shape.kv_heads // shape.world * shape.head_size, shape.own_kv_heads * shape.head_size),
        "inner": (rank * shape.own_inner, shape.own_inner),
        "vocabulary": share(shape, rank),
    }
    rows, columns = (0, N), (0, K)
    if kind in KINDS:
        begin, count = ranges[KINDS[kind]]
        rows = (begin, begin + count)
    elif kind in MIXING:
        begin, count = ranges[MIXING[kind]]
        columns = (begin, begin + count)
    return Part(rows, columns)


def part_layer(layer: LayerConfig, part: Part, K: int) -> LayerConfig:
    """The settings of a part of a packed layer of K inputs: its groups may be smaller, its scales have 16 bits."""
    layer = layer._replace(scale_bits=16)
    if part.inputs == K or layer.group == 0:
        return layer
    return layer._replace(group=math.gcd(part.inputs, layer.group))


def problem(shape: Shape, world: int, packed: bool) -> str | None:
    """Why `world` ranks cannot share a model, in words; packed: its layers are."""
    for name, count in (("heads", shape.heads), ("inner features", shape.inner)):
        if count % world:
            return f"{count} {name} cannot be shared by {world} processes"
    if shape.kv_heads % world and world % shape.kv_heads:
        return f"{shape.kv_heads} kv heads cannot be shared by {world} processes"
    for name, count in (("inputs from heads", shape.heads * shape.head_size), ("inner features", shape.inner)):
        if packed and world > 1 and count // world % WORD:
            return f"{count} {name} cannot be cut for {world} processes between words of {WORD} codes"
    return None


def check_split(shape: Shape, world: int, packed: bool) -> None:
    """Raise LutqError, naming the numbers of processes that would do, unless `world` ranks can share a model."""
    found = problem(shape, world, packed)
    if found:
        fitting = [str(n) for n in range(1, shape.heads + 1) if problem(shape, n, packed) is None]
        words = " or ".join(filter(None, (", ".join(fitting[:-1]), fitting[-1])))
        raise LutqError(f"{found}: use torchrun --nproc-per-node {words}")


def part_linear(linear: torch.nn.Linear, part: Part, layer: LayerConfig | None, rank: int) -> torch.nn.Module:
    """An unfilled layer for a part of one on the meta device, packed if it has a LayerConfig."""
    bias = linear.bias is not None and (linear.in_features == part.inputs or rank == 0)
    made = torch.nn.Linear(part.inputs, part.outputs, bias=bias, device="meta", dtype=linear.weight.dtype)
    if layer is None:
        return made
    return LutLinear(part.inputs, part.outputs, part_layer(layer, part, linear.in_features), made.bias, device="meta")


def split_linears(model: Any, shape: Shape, rank: int, layers: dict[str, LayerConfig]) -> dict[str, Part]:
    """Put a rank's parts, unfilled, in place of the Linear layers of a skeleton; the parts by module name."""
    parts = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            parts[name] = part_of(name, linear.out_features, linear.in_features, shape, rank)
            if parts[name] != Part((0, linear.out_features), (0, linear.in_features)) or name in layers:
                model.set_submodule(name, part_linear(linear, parts[name], layers.get(name), rank))
    return parts


def tie_head(model: Any, parts: dict[str, Part]) -> None:
    """Make the head's part of a model with tied embeddings a view of the embedding."""
    table = model.get_input_embeddings().weight.detach()
    for key in model.all_tied_weights_keys:
        owner = key.rpartition(".")[0]
        model.get_submodule(owner).weight = torch.nn.Parameter(table[slice(*parts[owner].rows)], requires_grad=False)
