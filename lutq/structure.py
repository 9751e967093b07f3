"""What a model consists of, read off its skeleton on the meta device: no weights and no layer names are needed.

The Linear layers inside the decoder blocks are what lutq quantizes; everything else is kept, except that the output head
may be quantized on request.
"""

from typing import Any, NamedTuple

import torch

from lutq.errors import LutqError
from lutq.source import Source


class Linear(NamedTuple):
    """A Linear layer of the skeleton: W [N, K]. place: `block`, `head`, or `outside` of the decoder blocks."""

    N: int
    K: int
    place: str


class Structure(NamedTuple):
    """linears: module name -> Linear. tensors: state-dict name -> shape, in model order.

    tied: state-dict name of a tensor that repeats another -> that other name. prefix: of the base model's names.
    """

    linears: dict[str, Linear]
    tensors: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    prefix: str

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return sum(torch.Size(shape).numel() for key, shape in self.tensors.items() if key not in self.tied)


def skeleton(config: Any) -> torch.nn.Module:
    """The causal language model of a transformers config on the meta device. Raises LutqError where there is none."""
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder or not getattr(config, "is_decoder", True):
        raise LutqError(f"model type {config.model_type!r} is no decoder: {REMEDY}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise LutqError(f"model type {config.model_type!r} is not a causal language model here ({reason}): {REMEDY}") from error


REMEDY = "lutq quantizes OPT, LLaMA, Mistral, Qwen2, Qwen3 and models built like them"


def decoder_blocks(model: torch.nn.Module) -> str:
    """Name of the list of decoder blocks: the largest ModuleList with Linear layers. Raises LutqError for none."""
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and any(isinstance(m, torch.nn.Linear) for m in module.modules())
    ]
    if not lists:
        raise LutqError(f"{type(model).__name__} has no Linear layers inside decoder blocks: {REMEDY}")
    _, name, blocks = max(lists, key=lambda entry: entry[0])
    fused = next((key for key, p in blocks.named_parameters() if p.dim() > 2), None)
    if fused:
        raise LutqError(f"{type(model).__name__} keeps weights outside Linear layers ({name}.{fused}): {REMEDY}")
    return name


def read_structure(config: Any) -> Structure:
    """Structure of the causal language model of a config."""
    model = skeleton(config)
    blocks_name = decoder_blocks(model)
    head = model.get_output_embeddings()
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            place = "head" if module is head else "block" if name.startswith(blocks_name + ".") else "outside"
            linears[name] = Linear(module.out_features, module.in_features, place)
    shapes, tied = tensor_shapes(model)
    return Structure(linears, shapes, tied, f"{model.base_model_prefix}.")


def tensor_shapes(model: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """State-dict name -> shape, in model order; and name -> other name for every tensor that is tied to another."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes, {key: other for key, other in model.all_tied_weights_keys.items() if key in shapes}


def match_tensors(structure: Structure, source: Source) -> tuple[dict[str, str], list[str]]:
    """State-dict name -> name in the source, for every tensor of the model, and the source's tensors nobody asks for.

    The files may leave out the prefix of the base model or have it in addition, as older hub checkpoints do, and may
    leave out tied tensors. Raises LutqError where a tensor is missing or has another shape than the config says.
    """
    available = set(source.keys)
    names = {}
    for key, shape in structure.tensors.items():
        spellings = (key, key.removeprefix(structure.prefix), structure.prefix + key)
        found = next((name for name in spellings if name in available), None)
        if found is None:
            if key in structure.tied:
                continue
            raise LutqError(f"{source.path} lacks the tensor {key} that its config.json asks for: the two do not belong together")
        if source.shape(found) != shape:
            raise LutqError(
                f"{source.path}: {found} has shape {list(source.shape(found))} but config.json asks for {list(shape)}: "
                "the two do not belong together"
            )
        names[key] = found
    for key, other in structure.tied.items():
        names[key] = names[other]
    return names, sorted(available - set(names.values()))
