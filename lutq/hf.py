"""lutq inside transformers: `import lutq.hf` lets `AutoModelForCausalLM.from_pretrained` read lutq checkpoints, and
`lutq.load` does that for you and checks more.

A program that reads a lutq checkpoint without this module fails loudly: transformers only warns about a quant_method it
does not know and would go on with random weights, so one quantized layer also stores an empty tensor under its ordinary
name (`quantization_config.guard`), and transformers refuses a weight of the wrong size. Config and tokenizer stay readable
for every tool.
"""

import re
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lutq.config import FORMAT_VERSION, LATER_VERSION, LayerConfig, check_bits, check_group, check_scale_bits
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.ops import choose_backend, working_backend
from lutq.ordered import OrderedLinear
from lutq.pack import EIGHT_BIT, LOWER, OWN, lower_shapes
from lutq.parallel.load import load_part
from lutq.parallel.ranks import current
from lutq.precisions import choose, contents, state_dict
from lutq.runtime import dtype_name, free_memory, out_of_memory, resolve_device, resolve_dtype, size
from lutq.shards import Spec
from lutq.source import Source, load_config, locate, read_json, shard_files, tensor_specs
from lutq.structure import match_tensors, read_structure, skeleton, tensor_shapes


@register_quantization_config("lutq")
class LutqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a lutq checkpoint.

    modules: name of each quantized Linear layer -> fields of `LayerConfig`. settings: what `lutq quantize` was asked.
    lowest_bits: each layer can be loaded at every precision from this to its own; 0: at its own only (lutq/precisions.py).
    ordered: those whose columns are in an order of their own, see lutq/ordered.py.
    Raises LutqError for a format this version cannot read.
    """

    lowest_bits = 0
    ordered: Sequence[str] = ()

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        guard: str = "",
        format_version: int = FORMAT_VERSION,
        lutq_version: str = "",
        settings: dict[str, Any] | None = None,
        lowest_bits: int = 0,
        ordered: Sequence[str] = (),
        quant_method: str = "lutq",
        **unknown: Any,
    ) -> None:
        if format_version not in (FORMAT_VERSION, LATER_VERSION) or unknown:
            what = f"format version {format_version}" + (f" and {sorted(unknown)}" if unknown else "")
            raise LutqError(
                f"this checkpoint was written by lutq {lutq_version or '?'} ({what}), which this version cannot read: "
                "pip install --upgrade lutq"
            )
        self.quant_method = quant_method
        self.modules, self.guard = modules or {}, guard
        self.format_version, self.lutq_version, self.settings = format_version, lutq_version, settings or {}
        if lowest_bits:  # written only where there is something to choose
            self.lowest_bits = lowest_bits
        if ordered:
            self.ordered = ordered

    def layers(self) -> dict[str, LayerConfig]:
        """Module name -> how it is stored. Raises LutqError for fields that this version does not know."""
        try:
            layers = {name: LayerConfig(**fields) for name, fields in self.modules.items()}
        except (TypeError, AttributeError) as error:
            raise LutqError(f"quantization_config.modules is not as lutq writes it ({error}): quantize again") from error
        for name, layer in layers.items():
            where = f"quantization_config.modules.{name}"
            if (layer.bits, layer.grid, layer.offsets) != (8, "uniform", True):  # what `lutq convert` makes of 8 bits
                check_bits(layer.bits, f"{where}.bits")
            check_group(layer.group, f"{where}.group")
            check_scale_bits(layer.scale_bits, f"{where}.scale_bits")
            counts = (layer.outliers_per_row, layer.low_rank)
            known = layer.grid in ("bcq", "uniform") and type(layer.offsets) is bool
            if not known or any(type(count) is not int or count < 0 for count in counts):
                raise LutqError(f"{where} has values this version does not know: {layer._asdict()}: pip install --upgrade lutq")
        found = {layer.bits for layer in layers.values()}
        several = type(self.lowest_bits) is int and len(found) == 1 and 0 < self.lowest_bits < max(found)
        plain = all(layer.scale_bits == 16 and not layer.corrected for layer in layers.values())
        if self.lowest_bits and not (several and plain):
            raise LutqError(
                f"quantization_config.lowest_bits is {self.lowest_bits!r} and must be at least 1 and less than the bits of the "
                "layers, which must be equal, without corrections and with scales of 16 bits: quantize again"
            )
        return layers

    def at(self, bits: int | None) -> "LutqConfig":
        """The config of an ordinary model of `bits` bits, or None for all that each layer has."""
        layers = self.layers()
        modules = {name: (layer._replace(bits=bits) if bits else layer).to_dict() for name, layer in layers.items()}
        return LutqConfig(**self.to_dict() | {"modules": modules, "lowest_bits": 0})


loading: ContextVar[bool] = ContextVar("loading", default=False)  # whether `load` has called from_pretrained


@register_quantizer("lutq")
class LutqHfQuantizer(HfQuantizer):
    """Puts `LutLinear` modules in place of the quantized Linear layers before transformers loads the tensors."""

    requires_calibration = True
    quantization_config: LutqConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        replace_linears(model, self.quantization_config)
        if checkpoint_files:
            check_tensors(model, self.quantization_config, [Path(file) for file in checkpoint_files])
        ignored = {f"^{re.escape(self.quantization_config.guard)}$", rf"\.({'|'.join(LOWER)})$"}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        self.quantization_config = self.quantization_config.at(None)  # of the model, whatever else the files serve
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Kernel order now: the first product may be one that torch compiles, which cannot make it. `load` does so itself."""
        if not loading.get():
            for module in model.modules():
                if isinstance(module, LutLinear):
                    module.prepack()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What save_pretrained writes: the state dict and the guard."""
        return model.state_dict() | {self.quantization_config.guard: torch.empty(0, dtype=model.dtype)}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = resolve_dtype(dtype, model.dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, LutLinear):
                linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
                linear.weight = torch.nn.Parameter(module.dequantize(dtype), requires_grad=False)
                linear.bias = module.bias
                model.set_submodule(name, linear)
        return model

    @property
    def is_trainable(self) -> bool:
        """No gradients through packed weights."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operator has a fake kernel, so torch.compile works."""
        return True

    def is_serializable(self) -> bool:
        """save_pretrained writes the packed tensors as they are."""
        return True


def replace_linears(model: torch.nn.Module, quantization: LutqConfig) -> None:
    """Put unfilled LutLinear modules on the meta device in place of the Linear layers that the config names.

    Raises LutqError when the model has no such Linear layer.
    """
    for name, layer in quantization.layers().items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, torch.nn.Linear):
            raise LutqError(
                f"quantization_config names {name}, which is no Linear layer of {type(model).__name__}: quantize again"
            )
        kind = OrderedLinear if name in quantization.ordered else LutLinear
        model.set_submodule(name, kind(linear.in_features, linear.out_features, layer, linear.bias, device="meta"))


def check_tensors(model: torch.nn.Module, quantization: LutqConfig, files: list[Path]) -> None:
    """Raise LutqError unless the files hold exactly the tensors of `model`, those of lower precisions, and the guard.

    Headers are compared only; transformers itself checks neither the shapes of a quantized model nor leftovers.
    """
    found: dict[str, Spec] = {}
    for file in files:
        found |= tensor_specs(file)
    state = model.state_dict()
    shapes, tied = tensor_shapes(model)
    wanted = {}
    for key, shape in shapes.items():
        if key not in tied:
            packed = key.rpartition(".")[2] in (*OWN, "input_order")
            wanted[key] = Spec(shape, state[key].dtype if packed or key not in found else found[key].dtype)
    for name, layer in quantization.layers().items():
        module = model.get_submodule(name)
        lower = lower_shapes(module.out_features, module.in_features, layer, quantization.lowest_bits)
        wanted |= {f"{name}.{part}": Spec(*spec) for part, spec in lower.items()}
    for key, want in wanted.items():
        if found.get(key) != want:
            have = f"has shape {describe(found[key])} there" if key in found else "is missing"
            raise LutqError(
                f"config.json asks for {key} of shape {describe(want)}, but it {have}: copy or quantize the model again"
            )
    unknown = sorted(set(found) - set(wanted) - set(tied) - {quantization.guard})
    if unknown:
        raise LutqError(f"{unknown[0]} is not a tensor this version of lutq knows: pip install --upgrade lutq")


def describe(spec: Spec) -> str:
    """Shape and dtype in words, such as `[3, 4] in float16`."""
    return f"{list(spec.shape)} in {dtype_name(spec.dtype)}"


def load(
    model: str | Path = "lutq-out",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    bits: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model ready for inference: a lutq checkpoint, or any causal language model that transformers can load.

    model: directory, hub id, or "opt-tiny" (embedded). device: default the GPU if there is one. dtype: of activations and
    kept weights; auto is float32 on the CPU and the checkpoint's own on a GPU. backend: of LutLinear, see lutq/ops.py.
    bits: a precision that the checkpoint serves (`lutq info`); default the highest. A lower one reads no more than it needs.
    options: further arguments of from_pretrained, such as device_map, which replaces device. In one of several processes of a
    torchrun (lutq/parallel) the result is that rank's part, for the engine of `lutq generate`.
    Raises LutqError for anything that keeps the model from being complete and undamaged, or from fitting into memory.
    """
    path, _ = locate(existing(model))
    quantization = check_checkpoint(path)
    place = resolve_device(device)
    config = load_config(path)
    dtype = load_dtype(dtype, place, config)
    choose_backend(backend, place)
    layers = quantization.layers() if quantization else {}
    lower = choose(bits, layers, quantization.lowest_bits if quantization else 0, str(model))
    if current().world > 1:
        if options or lower:
            wrong = sorted(options)[0] if options else "--bits, which they do not take yet"
            raise LutqError(f"each of several processes loads its part: leave out {wrong}, or torchrun")
        return load_part(path, current(), place, dtype, backend)
    if "device_map" not in options:
        needed = model_bytes(path, dtype, layers, lower)
        if needed > free_memory(place):
            raise LutqError(f"{model} does not fit: {what_would_fit(path, dtype, place, needed)}")
        options["device_map"] = {"": place}
    options |= {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    with out_of_memory(lambda: what_would_fit(path, dtype, place, model_bytes(path, dtype, layers, lower))):
        mark = loading.set(True)
        try:
            if lower:
                loaded, info = load_lower(path, config, quantization, lower, options)
            else:
                loaded, info = AutoModelForCausalLM.from_pretrained(path, **options)
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, LutqError):
                raise
            raise LutqError(f"transformers cannot load {path}: {str(error).strip().split(chr(10))[0]}") from error
        finally:
            loading.reset(mark)
    if info["missing_keys"]:
        raise LutqError(f"{path} lacks the tensor {sorted(info['missing_keys'])[0]}: copy or quantize the model again")
    if quantization:
        for module in loaded.modules():
            if isinstance(module, LutLinear):
                module.backend = backend
                if not module.prepack() and not module.is_offloaded():
                    working_backend(backend, module.codes.device)  # compiled now, not at the first product
    return loaded.eval()


def load_lower(path: Path, config: Any, quantization: LutqConfig, bits: int, options: dict[str, Any]) -> tuple[Any, dict]:
    """What from_pretrained makes of the first `bits` planes of an any-precision checkpoint with these options."""
    if (path / "generation_config.json").is_file():
        options = {"generation_config": GenerationConfig.from_pretrained(path)} | options
    config.quantization_config = quantization.at(bits).to_dict()
    state = state_dict(weight_files(path), quantization.layers(), bits)
    loaded, info = type(skeleton(config)).from_pretrained(None, config=config, state_dict=state, **options)
    loaded.config.name_or_path = loaded.name_or_path = str(path)
    return loaded, info


def load_dtype(dtype: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    """The dtype of --dtype: auto is float32 on the CPU and the checkpoint's own on a GPU. Raises LutqError."""
    return resolve_dtype(dtype, torch.float32 if device.type == "cpu" else config.dtype or torch.float16)


def existing(model: str | Path) -> str | Path:
    """The model as given; a LutqError with the remedy when the default output is not there yet."""
    if str(model) == "lutq-out" and not Path(model).exists():
        raise LutqError("there is no lutq-out here: run `lutq quantize` first, or give --model DIR")
    return model


def check_checkpoint(path: Path) -> LutqConfig | None:
    """Read every file's header and compare with the config; the LutqConfig of a lutq checkpoint, None for a plain model.

    Raises LutqError for what is missing, damaged or of an unknown format.
    """
    raw = read_json(path / "config.json", "is not a checkpoint directory: it needs a config.json")
    quantization = raw.get("quantization_config")
    if quantization is None:
        source = Source(path)
        match_tensors(read_structure(source.config), source)
        return None
    if quantization.get("quant_method") != "lutq":
        return None  # transformers knows what to do with it, or says so
    config = LutqConfig(**quantization)
    model = skeleton(load_config(path))
    replace_linears(model, config)
    check_tensors(model, config, weight_files(path))
    return config


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a lutq checkpoint. Raises LutqError when one is missing."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    return shard_files(path, "model.safetensors.index.json")


def model_bytes(path: Path, dtype: torch.dtype, layers: dict[str, LayerConfig] | None = None, bits: int | None = None) -> int:
    """Bytes that the tensors of a checkpoint take once loaded: packed tensors as they are, the others in `dtype`.

    layers, bits: of a lutq checkpoint, what `lutq.precisions.contents` takes to leave out what is not loaded.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        return sum(file.stat().st_size for file in path.glob("pytorch_model*.bin"))
    total = 0
    for file in files:
        for key, (_, spec) in contents(tensor_specs(file), layers or {}, bits).items():
            part = key.rpartition(".")[2]
            kept = torch.float16 if part in EIGHT_BIT else spec.dtype  # kernels take scales in 16 bits
            total += Spec(spec.shape, kept if part in OWN else dtype).nbytes
    return total


def what_would_fit(path: Path, dtype: torch.dtype, device: torch.device, needed: int) -> str:
    """What a model needs against what the device has, and which bits or devices would do."""
    free = free_memory(device)
    words = f"its weights take {size(needed)} in {dtype_name(dtype)} and {device} has {size(free)} free"
    structure = read_structure(load_config(path))
    linear = sum(layer.N * layer.K for layer in structure.linears.values() if layer.place == "block")
    kept = structure.parameters - linear
    sizes = {bits: linear * (bits + 0.5) / 8 + kept * dtype.itemsize for bits in (4, 3, 2)}
    fitting = [f"{bits} bits ({size(count)})" for bits, count in sizes.items() if count < min(free, needed)]
    if fitting:
        return f"{words}; quantized to {fitting[0]} it would fit: lutq quantize --bits {fitting[0][0]}"
    if dtype == torch.float32:
        return f"{words}; try --dtype bfloat16"
    return f"{words}; " + (
        "use --device cpu or a GPU with more memory" if device.type == "cuda" else "use a machine with more memory"
    )
