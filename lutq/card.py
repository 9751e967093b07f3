"""The model card (README.md) of a quantized checkpoint."""

from lutq import __version__
from lutq.report import (
    CONVERTED_HEADER,
    HEADER,
    Conversion,
    Report,
    bits_per_weight,
    eight_bit,
    markdown_table,
    relative_error,
    rows,
    shorten,
)


def model_card(report: Report) -> str:
    """Markdown: what it was made from and how, how to load it, and the measured figures."""
    from lutq.runtime import size

    config = report.config
    settings = "\n".join(f"{key} = {toml_value(value)}" for key, value in config.to_dict().items() if key != "overrides")
    tables = "".join(
        f"\n[overrides.{toml_value(pattern)}]\n" + "".join(f"{k} = {toml_value(v)}\n" for k, v in override.items())
        for pattern, override in config.overrides.items()
    )
    calibration = "".join(
        f"\n* {title}: {words}" for title, words in (report.calibration.figures() if report.calibration else {}).items()
    )
    precisions = "".join(f"\n* {title} {words}" for title, words in (report.precisions() | report.times()).items())
    scales = "".join(f"\n* {title} {words}" for title, words in eight_bit(report.layers).items())
    corrections = "".join(f"\n* {title}: {words}" for title, words in report.corrections().items())
    return f"""---
base_model: {report.source}
library_name: transformers
pipeline_tag: text-generation
tags: [lutq, bcq, quantized]
---

# {report.source}, {bits_per_weight(report.layers):.2f} bits per weight

The Linear layers of `{report.source}` quantized with lutq {__version__}, method `{config.method}`.

```python
import lutq

model = lutq.load("path/of/this/directory")  # a transformers model
```

or `import lutq.hf` and `transformers.AutoModelForCausalLM.from_pretrained(...)`; or on the command line
`lutq generate "Once upon a time" --model DIR` and `lutq eval-ppl wikitext2 --model DIR`. Without lutq the checkpoint does
not load: transformers stops at a size mismatch of a tensor that is empty on purpose.

## Figures

{markdown_table(HEADER, rows(report.layers))}

* bits per weight: {bits_per_weight(report.layers):.3f} in the quantized layers, {report.counted()};
  {8 * report.bytes_after / report.parameters:.3f} in the whole model{corrections}{precisions}{scales}
* size: {size(report.bytes_before)} before, {size(report.bytes_after)} after
* relative error of the quantized weights (Frobenius): {relative_error(report.layers):.4f}{calibration}
* Linear layers kept as they are: {len(report.kept)}{" (" + shorten(report.kept) + ")" if report.kept else ""}

## Settings

The same weights come out of `lutq quantize {report.source} --recipe FILE` with this in FILE:

```toml
{settings}
{tables}```
"""


def converted_card(report: Conversion) -> str:
    """The model card of a converted checkpoint, Markdown."""
    figures = "\n".join(f"* {title}: {words}" for title, words in report.figures().items())
    return f"""---
base_model: {report.source}
library_name: transformers
pipeline_tag: text-generation
tags: [lutq, quantized]
---

# {report.source} for lutq

`{report.source}`, quantized by {report.kind}, converted with lutq {__version__}: the same weights in lutq's bit-planes.

```python
import lutq

model = lutq.load("path/of/this/directory")  # a transformers model
```

or on the command line `lutq generate "Once upon a time" --model DIR`. Without lutq the checkpoint does not load: transformers
stops at a size mismatch of a tensor that is empty on purpose.

{markdown_table(CONVERTED_HEADER, report.body())}

{figures}
"""


def toml_value(value: bool | int | float | str) -> str:
    """A value as TOML spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
