"""lutq: large language models in 1 to 4 bits, with binary-coding quantization and LUT-GEMM.

    import lutq
    model = lutq.load("lutq-out")        # a transformers model whose Linear layers are LutLinear

`import lutq` is instant: torch and transformers are imported when a name below is first used. To let
`AutoModelForCausalLM.from_pretrained` read lutq checkpoints, `import lutq.hf`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "load": "lutq.hf",
    "LutLinear": "lutq.linear",
    "LutqError": "lutq.errors",
    "QuantConfig": "lutq.config",
    "quantize_checkpoint": "lutq.quantize",
}
__all__ = ["LutLinear", "LutqError", "QuantConfig", "__version__", "load", "quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lutq' has no attribute {name!r}")
