"""The embedded model by default settings: perplexity at 16, 4, 3 and 2 bits.

Protocol gptq, first 50 windows of 1024 tokens, fp32 on a CPU. Measured on 2026-11-22 with lutq 0.1.0 and torch 2.13.
"""

import itertools

import pytest

from lutq.config import QuantConfig
from lutq.evaluate import evaluate
from lutq.quantize import quantize_checkpoint

MEASURED = {16: 49.617, 4: 59.740, 3: 96.001, 2: 648.66}
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def perplexities(tmp_path_factory, embedded):
    """bits -> perplexity; 16 is the model as it is."""
    models = {16: "opt-tiny", QuantConfig().bits: str(embedded)}
    for bits in MEASURED:
        if bits not in models:
            models[bits] = str(tmp_path_factory.mktemp("bits") / f"{bits}")
            quantize_checkpoint(None, models[bits], QuantConfig(bits=bits), device="cpu")
    return {bits: evaluate(model=model, max_windows=50, device="cpu", progress=False)[0] for bits, model in models.items()}


@pytest.mark.parametrize("bits", MEASURED)
def test_measured(perplexities, bits):
    result = perplexities[bits]
    assert (result.windows, result.window, result.protocol) == (50, 1024, "gptq"), f"{bits=} {result}"
    assert abs(result.perplexity / MEASURED[bits] - 1) <= TOLERANCE, f"{bits=} {result.perplexity=} {MEASURED[bits]=}"


def test_rises_as_bits_fall(perplexities):
    figures = [perplexities[bits].perplexity for bits in sorted(MEASURED, reverse=True)]
    assert all(more < fewer for more, fewer in itertools.pairwise(figures)), f"{figures=}"
