"""What a quantization did, and how it is shown: on the terminal and in the model card."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lutq.config import LayerConfig, QuantConfig


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized Linear layer: W [N, K] stored in `nbytes`; squared Frobenius norms of W and of its error."""

    name: str
    N: int
    K: int
    layer: LayerConfig
    nbytes: int
    error: float
    norm: float

    @property
    def kind(self) -> str:
        """Last part of the name, such as q_proj."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What calibration did. before, after: root mean square over the layers of the relative output error on the calibration
    text, of the plain fit and of the calibrated one; 0 where the text only served to choose bits. distilled: bits -> divergence
    from the original model on held-out windows before and after, in nats per token, for each precision that the checkpoint
    serves; empty without that stage. weighted: tokens count for the output errors as the end loss feels them.
    """

    text: str
    before: float
    after: float
    distilled: dict[int, tuple[float, float]]
    weighted: bool = False

    def figures(self) -> dict[str, str]:
        """Title -> figures in words."""
        weighted = ", its tokens weighted by the end loss" if self.weighted else ""
        figures = {"calibration text": self.text}
        if self.before:
            figures["output error"] = f"{self.before:.4f} -> {self.after:.4f} of the layers on that text{weighted}"
        if self.distilled:
            several = len(self.distilled) > 1
            pairs = [f"{a:.4f} -> {b:.4f}" + several * f" at {bits} bits" for bits, (a, b) in sorted(self.distilled.items())]
            figures["divergence"] = f"{', '.join(pairs)} nats per token from the original model, on held-out windows"
        return figures


@dataclasses.dataclass(frozen=True)
class Run:
    """Figures of one run. Sizes in bytes, time in seconds of this process; `kept` names Linear layers left as they are."""

    source: str
    out: Path
    layers: list[LayerReport]
    kept: list[str]
    ignored: list[str]
    bytes_before: int
    bytes_after: int
    parameters: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report(Run):
    """Figures of one run of `lutq quantize`. target_bpw: the budget that bits were chosen under, 0 without one; that of time is
    in `latency`.
    """

    config: QuantConfig
    peak: str
    calibration: CalibrationReport | None = None
    latency: dict[str, Any] | None = None
    target_bpw: float = 0.0

    def times(self) -> dict[str, str]:
        """What a budget of time was kept with, as title -> words; nothing where there was none."""
        from lutq.latency import words

        return {"time of products": words(self.latency)} if self.latency else {}

    def precisions(self) -> dict[str, str]:
        """What an any-precision checkpoint serves, as title -> words; nothing for others."""
        from lutq.precisions import serving

        shapes = [(layer.N, layer.K, layer.layer) for layer in self.layers]
        return {"serves": serving(shapes, self.config.lowest_bits)} if self.config.lowest_bits else {}

    def corrections(self) -> dict[str, str]:
        """What is stored beside the planes, as title -> words."""
        from lutq.residual import costs

        return costs((layer.N, layer.K, layer.layer) for layer in self.layers)

    def counted(self) -> str:
        """What bits per weight include besides codes, and the budget that they were kept with, if any."""
        included = "scales, offsets and corrections included" if self.corrections() else "scales and offsets included"
        return included + (f", of {self.target_bpw:g} allowed" if self.target_bpw else "")

    def summary(self) -> str:
        """The table printed at the end of `lutq quantize`."""
        from lutq.runtime import size

        lines = [table(HEADER, rows(self.layers)), ""]
        lines += [
            f"bits per weight   {bits_per_weight(self.layers):.3f} in the quantized layers, {self.counted()}; "
            f"{8 * self.bytes_after / self.parameters:.3f} in the whole model",
            *(f"{title:16}  {words}" for title, words in (self.corrections() | self.precisions()).items()),
            *(f"{title:16}  {words}" for title, words in (eight_bit(self.layers) | self.times()).items()),
            f"size              {size(self.bytes_before)} -> {size(self.bytes_after)}",
            f"relative error    {relative_error(self.layers):.4f} of the quantized weights (Frobenius)",
            *(f"{title:16}  {words}" for title, words in (self.calibration.figures() if self.calibration else {}).items()),
            f"kept as they are  {len(self.kept)} Linear layers{': ' if self.kept else ''}{shorten(self.kept)}",
            f"peak memory       {self.peak}",
            f"time              {self.seconds:.1f} s",
        ]
        if self.ignored:
            lines.append(f"not in the model  {len(self.ignored)} tensors of the source left out: {shorten(self.ignored)}")
        lines.append(f"Quantized {self.source} to {self.out} with {bits_per_weight(self.layers):.3f} bits per weight.")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Conversion(Run):
    """Figures of one run of `lutq convert`. kind: the source's quant_method; `ordered` names layers whose inputs have an order of
    their own.
    """

    kind: str
    ordered: list[str]

    def body(self) -> list[tuple[str, ...]]:
        """A row per kind of layer, bits and group, in order of appearance."""
        return [row[:-1] for row in rows(self.layers)[:-1]]

    def figures(self) -> dict[str, str]:
        """Title -> figures in words."""
        from lutq.runtime import size

        whole = 8 * self.bytes_after / self.parameters
        figures = {
            "bits per weight": f"{bits_per_weight(self.layers):.3f} in the quantized layers, scales and zero points included; "
            f"{whole:.3f} in the whole model",
            "size": f"{size(self.bytes_before)} -> {size(self.bytes_after)}",
            "kept as they are": f"{len(self.kept)} Linear layers{': ' if self.kept else ''}{shorten(self.kept)}",
        }
        if self.ordered:
            figures["activation order"] = f"{len(self.ordered)} layers put their inputs into order first: {shorten(self.ordered)}"
        return figures

    def summary(self) -> str:
        """The table printed at the end of `lutq convert`."""
        import torch

        from lutq.runtime import peak_memory

        figures = self.figures() | {"peak memory": peak_memory(torch.device("cpu")), "time": f"{self.seconds:.1f} s"}
        if self.ignored:
            figures["not in the model"] = f"{len(self.ignored)} tensors of the source left out: {shorten(self.ignored)}"
        lines = [f"{title:16}  {words}" for title, words in figures.items()]
        last = f"Converted {self.source} ({self.kind}) to {self.out}; every weight is what it was."
        return "\n".join([table(CONVERTED_HEADER, self.body()), "", *lines, last])


HEADER = ("layer", "count", "bits", "group", "bits/weight", "rel. error")
CONVERTED_HEADER = HEADER[:-1]


def bits_per_weight(layers: Iterable[LayerReport]) -> float:
    """Stored bits per weight of some layers, everything but the bias counted."""
    layers = list(layers)
    return 8 * sum(layer.nbytes for layer in layers) / sum(layer.N * layer.K for layer in layers)


def relative_error(layers: Iterable[LayerReport]) -> float:
    """|W - Q| / |W| over some layers together (Frobenius norms)."""
    layers = list(layers)
    norm = sum(layer.norm for layer in layers)
    return math.sqrt(sum(layer.error for layer in layers) / norm) if norm else 0.0


def eight_bit(layers: Iterable[LayerReport]) -> dict[str, str]:
    """What scales in 8 bits save, as title -> words; nothing where there are none."""
    from lutq.pack import packed_shapes, stored_shapes
    from lutq.shards import Spec

    layers = list(layers)
    chosen = [layer for layer in layers if layer.layer.scale_bits == 8]
    if not chosen:
        return {}

    def nbytes(shapes: Callable[[int, int, LayerConfig], dict[str, tuple]]) -> int:
        return sum(Spec(*spec).nbytes for layer in chosen for spec in shapes(layer.N, layer.K, layer.layer.bare()).values())

    saved = 8 * (nbytes(packed_shapes) - nbytes(stored_shapes)) / sum(layer.N * layer.K for layer in layers)
    where = "" if len(chosen) == len(layers) else f" in {len(chosen)} of {len(layers)} layers"
    return {"scales": f"in 8 bits{where}, which saves {saved:.3f} bits per weight, second-level scales counted"}


def by_kind(layers: Iterable[LayerReport]) -> dict[tuple, list[LayerReport]]:
    """(kind, fields of LayerConfig) -> layers, in order of appearance."""
    kinds: dict[tuple, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault((layer.kind, *layer.layer), []).append(layer)
    return kinds


def rows(layers: Iterable[LayerReport]) -> list[tuple[str, ...]]:
    """A row per kind of layer, bits and group, in order of appearance, and one for all."""
    layers = list(layers)
    result = []
    for (kind, bits, group, *_), members in by_kind(layers).items():
        figures = (f"{bits_per_weight(members):.3f}", f"{relative_error(members):.4f}")
        result.append((kind, str(len(members)), str(bits), str(group or "row"), *figures))
    result.append(("all", str(len(layers)), "", "", f"{bits_per_weight(layers):.3f}", f"{relative_error(layers):.4f}"))
    return result


def table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """Columns of text, the first flush left and the others flush right."""
    lines = [header, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def markdown_table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """The same as a Markdown table."""
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shorten(names: list[str], most: int = 6) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
