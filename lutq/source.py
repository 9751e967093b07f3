"""A source checkpoint read one tensor at a time: a hub id, a directory, or the embedded model; never the whole model.

Directories hold `config.json` and safetensors (one file or shards with an index) or, as the OPT hub repositories ship
them, `pytorch_model.bin` files, which are read with `weights_only=True`.
"""

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lutq.errors import LutqError
from lutq.paths import ASSETS
from lutq.shards import DTYPES_BY_NAME, Spec

EMBEDDED = "opt-tiny"
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def locate(model: str | Path | None) -> tuple[Path, str]:
    """Directory of a model and the name to show for it; a hub id is downloaded (or found in the cache) first.

    None and "opt-tiny" mean the embedded model unless a directory of that name exists. Raises LutqError.
    """
    if model is None or (str(model) == EMBEDDED and not Path(EMBEDDED).is_dir()):
        return ASSETS / EMBEDDED, EMBEDDED
    path, name = Path(model).expanduser(), str(model)
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise LutqError(f"{name} is a file: give the directory that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise LutqError(f"no directory {name}: give a checkpoint directory or a hub id such as facebook/opt-125m")
    return download(name), name


def download(hub_id: str) -> Path:
    """Snapshot of a hub repository: its small files and safetensors, or `pytorch_model*.bin` where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "model*.safetensors"]))
        if not any((path / name).exists() for name in WEIGHTS[:2]):
            path = Path(snapshot_download(hub_id, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LutqError(
            f"no directory {hub_id!r} here and no model of that name could be fetched from the hub ({reason}): "
            "check the name and the network, or give a directory"
        ) from error
    return path


class Source:
    """An open checkpoint directory.

    name: as the user gave it. config: the transformers config. raw_config: config.json as it is. keys: tensor names.
    quantized: it may have been quantized already, by whatever program. Raises LutqError for whatever keeps it from being a
    complete, undamaged checkpoint, before any work is done.
    """

    def __init__(self, model: str | Path | None = None, quantized: bool = False) -> None:
        self.path, self.name = locate(model)
        self.raw_config = read_json(self.path / "config.json", "is not a checkpoint directory: it needs a config.json")
        if "quantization_config" in self.raw_config and not quantized:
            method = self.raw_config["quantization_config"].get("quant_method", "unknown")
            raise LutqError(f"{self.path} is already quantized (quant_method {method!r}): give the original, or see lutq convert")
        self.config = load_config(self.path)
        self._files = self._find_files()
        self._where: dict[str, Path] = {}
        self._specs: dict[str, Spec] = {}
        for file in self._files:
            for key, spec in tensor_specs(file).items():
                self._where[key], self._specs[key] = file, spec

    @property
    def keys(self) -> list[str]:
        """Names of the tensors in the files."""
        return list(self._where)

    @property
    def nbytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(file.stat().st_size for file in self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._specs[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor in the file."""
        return self._specs[key].dtype

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._where[key]

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor on the CPU, in the dtype of the file. Raises LutqError if it cannot be read.

        The file is opened anew each time: a mapping that stays open would keep every page read so far in memory.
        """
        file = self._where[key]
        try:
            return load_bin(file)[key] if file.suffix == ".bin" else open_safetensors(file).get_tensor(key)
        except (SafetensorError, RuntimeError) as error:
            raise LutqError(f"{file} is damaged at {key} ({error}): download it again") from error

    def _find_files(self) -> list[Path]:
        found = next((name for name in WEIGHTS if (self.path / name).is_file()), None)
        if found is None:
            raise LutqError(f"{self.path} has no weights: it needs model.safetensors or pytorch_model.bin (or shards)")
        if not found.endswith(".index.json"):
            return [self.path / found]
        return shard_files(self.path, found)


def shard_files(path: Path, index_name: str) -> list[Path]:
    """Files that an index names, all of which must exist."""
    weight_map = read_json(path / index_name, "has no index of its shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LutqError(f"{path / index_name} has no weight_map of names to files: download it again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        raise LutqError(f"{path} lacks the shard {missing[0] if missing else 'list'} that {index_name} names: copy it again")
    return [path / name for name in names]


def open_safetensors(file: Path) -> Any:
    """A safetensors handle on the CPU; its header has been checked against the file's length."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LutqError(f"{file} is damaged or cut short ({error}): download it again") from error


def tensor_specs(file: Path) -> dict[str, Spec]:
    """Tensor name -> shape and dtype of everything in a weight file. Raises LutqError if it is damaged."""
    if file.suffix == ".bin":
        return {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in load_bin(file).items()}
    handle = open_safetensors(file)
    slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118, the handle is not a dict
    unknown = sorted(key for key, part in slices.items() if part.get_dtype() not in DTYPES_BY_NAME)
    if unknown:
        raise LutqError(f"{file}: {unknown[0]} has dtype {slices[unknown[0]].get_dtype()}: give a checkpoint of 16 or 32 bits")
    return {key: Spec(tuple(part.get_shape()), DTYPES_BY_NAME[part.get_dtype()]) for key, part in slices.items()}


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """A `pytorch_model.bin` as a dict of tensors, without running any pickled code.

    Files in the format before torch 1.6 cannot be memory-mapped; the last one read stays in memory.
    """
    with file.open("rb") as stream:
        is_mappable = stream.read(4) == b"PK\x03\x04"
    return load_mapped_bin(file) if is_mappable else load_whole_bin(file, file.stat().st_mtime_ns)


def load_mapped_bin(file: Path, mmap: bool = True) -> dict[str, torch.Tensor]:
    """The state dict in a file. Raises LutqError if it is damaged or holds anything but tensors."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LutqError(f"{file} is damaged or not a plain state dict ({reason}): download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise LutqError(f"{file} is not a plain state dict of tensors: give a checkpoint as transformers saves it")
    return state


@functools.lru_cache(maxsize=1)
def load_whole_bin(file: Path, changed: int) -> dict[str, torch.Tensor]:
    """`load_mapped_bin` for a file that cannot be mapped and was changed at this time (ns)."""
    return load_mapped_bin(file, mmap=False)


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object; `otherwise` completes the sentence "DIR ..." when the file is missing."""
    if not path.is_file():
        raise LutqError(f"{path.parent} {otherwise}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LutqError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise LutqError(f"{path} does not hold a JSON object: download it again")
    return content


def load_config(path: Path) -> Any:
    """The transformers config of a checkpoint directory; code from the checkpoint is never run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LutqError(
            f"transformers cannot read {path / 'config.json'} ({reason}): correct it or update transformers"
        ) from error
