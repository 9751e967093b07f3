r"""Quantization settings: one dataclass whose field names are the flags of `lutq quantize`, the keys of a recipe
(`configs/*.toml`) and the keys saved in a checkpoint's `quantization_config`. Defaults live here and nowhere else.

A recipe may end with an override table, a regular expression on the module name to what differs there:

    [overrides."fc2$"]
    bits = 4
    [overrides."layers\\.0\\."]
    skip = true

Tables are applied from top to bottom, so a later match wins key by key. The output head takes part when its table names bits
or `skip = false`.
"""

import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from lutq.errors import LutqError
from lutq.paths import shipped

METHODS = ("rtn", "greedy", "alternating", "feedback")
STARTS = ("range", "uniform", "greedy", "fine", "quantiles", "best")
KEEP_BITS = 16  # head_bits that leaves the output head as it is
MOST_OUTLIERS = 3.0  # percent; each takes 32 bits, or 48 among more than 32768 inputs
FORMAT_VERSION = 1  # of a checkpoint that every lutq reads
LATER_VERSION = 2  # where layers have scales in 8 bits or corrections: a lutq that knows version 1 alone refuses it


class LayerConfig(NamedTuple):
    """How one Linear layer is stored, as a checkpoint's `quantization_config.modules` says for each.

    bits: 1 to 4; on the uniform grid with zero points, for what other programs quantized, also 8 (lutq/eight.py).
    group: 0 is one group for the whole row. grid: `bcq` or `uniform`. offsets: every group has an offset, stored as
    `offsets` (bcq) or `zero_points` (uniform). scale_bits: of each scale and offset, 16 or 8 (lutq/scales.py).
    outliers_per_row: weights that are corrected beside the planes. low_rank: rank of a correction of all (lutq/residual.py).
    """

    bits: int
    group: int
    grid: str = "bcq"
    offsets: bool = True
    scale_bits: int = 16
    outliers_per_row: int = 0
    low_rank: int = 0

    @property
    def corrected(self) -> bool:
        """Whether there is anything beside the planes."""
        return self.outliers_per_row > 0 or self.low_rank > 0

    def bare(self) -> "LayerConfig":
        """The layer without corrections."""
        return self._replace(outliers_per_row=0, low_rank=0)

    def to_dict(self) -> dict[str, Any]:
        """As `quantization_config.modules` has it: what version 1 does not know only where it is not the default."""
        usual = LayerConfig._field_defaults
        return {name: value for name, value in self._asdict().items() if name in FIRST_FIELDS or value != usual[name]}


FIRST_FIELDS = LayerConfig._fields[:4]  # all that version 1 knows of a layer


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Settings of one `lutq quantize` run.

    bits: bit-planes per weight, 1 to 4.
    lowest_bits: the checkpoint serves every precision from this one to `bits`, each with scales of its own (see
        lutq/nested.py). 0: `bits` alone.
    group: inputs that share one set of scales, a multiple of 32, or 0 for the whole row.
    scale_bits: of each scale and BCQ offset, 16 or 8 (see lutq/scales.py).
    method: `rtn` (uniform grid), `greedy` or `alternating` (BCQ grid, see lutq/bcq.py), or `feedback` (BCQ grid fitted to the
        layer's outputs on a calibration text, see lutq/solve.py).
    offsets: store one offset per group besides the scales (BCQ grids).
    symmetric: uniform grid without zero points, its levels at odd multiples of half a step.
    clip: `rtn` searches the clipping range by squared error; otherwise the whole range is kept.
    start: which grid `alternating` starts from: the uniform grid over the whole `range`, the clip-searched `uniform` grid,
        the `greedy` one, the top planes of a `fine` uniform grid, least squares for `quantiles`, or `best`: all of these,
        keeping per group the smallest squared error.
    iterations, tolerance: `alternating` stops after so many rounds, or when a round lowers the squared error of the rows
        at hand by less than this fraction. `feedback` starts from such fits.
    calib: the calibration text of `feedback`, `scaling`, `refine` and `distill`: books, own (what the model itself writes, see
        lutq/samples.py), wikitext2, c4, ptb (their training splits) or a text file. calib_windows: windows of it. calib_length:
        tokens in each, 0 for the model's maximum up to 2048. seed: chooses the windows and their order.
    scaling: before the fit, search scales of the input channels of each layer, folded into the norm or layer before it
        (AWQ; see lutq/transform.py). BCQ grids only. learned_scaling: passes over the windows that learn such scales by
        gradient, from the searched ones where these are a better start (OmniQuant; see lutq/diagonal.py).
    damping: `feedback` adds this part of the mean of a Hessian's diagonal to the diagonal; more where it must.
    end_loss: `feedback` weighs calibration tokens, layer by layer, by how much the end loss feels an error of the layer's outputs
        there (see lutq/endloss.py), for which the whole model is on the device once.
    rounds: `feedback` refits each group's grid so many times. sweeps: of coordinate descent after that, at least
        one with scale_bits 8, where codes are chosen anew on the rounded grids.
    outliers: percent of the weights, of every row, that are corrected in fp16 beside the planes; low_rank: rank of a product of
        thin fp16 matrices that is added to a layer. Both are counted in its bits per weight (see lutq/residual.py).
    refine: passes over the windows that tune each block's scales, offsets, norms and biases to the original block's outputs
        (BCQ grids; see lutq/refine.py). distill: the same end to end, to the original model's next-token distribution.
        With lowest_bits each precision is tuned in turn, its scales and offsets alone: the others share the rest.
    flips: `refine` and `distill` learn the codes too, which takes 16 bytes of memory for each weight.
    rate: the largest step of a scale while tuning, in parts of its layer's root mean square.
    target_bpw: stored bits per weight of all quantized layers together, scales and offsets included; bits per layer are then
        chosen by their effect on the model's predictions (see lutq/allocate.py). 0: every layer has `bits`.
    target_ms: milliseconds that the products of all quantized layers may take together for one token, as measured on the device
        that quantizes (see lutq/latency.py); bits per layer are chosen as for target_bpw, under both budgets if both are given.
    groups: the groups that may be chosen with the bits, such as "32,64,128". Empty: `group`.
    head_bits: bits of the output head, 16 keeps it as it is.
    overrides: regular expression on the module name -> {bits, group, scale_bits, skip}.

    Raises LutqError for a value out of range.
    """

    bits: int = 3
    lowest_bits: int = 0
    group: int = 128
    scale_bits: int = 16
    method: str = "alternating"
    offsets: bool = True
    symmetric: bool = False
    clip: bool = True
    start: str = "range"
    iterations: int = 15
    tolerance: float = 1e-3
    calib: str = "books"
    calib_windows: int = 64
    calib_length: int = 0
    seed: int = 0
    scaling: bool = False
    learned_scaling: int = 0
    damping: float = 0.01
    end_loss: bool = False
    rounds: int = 8
    sweeps: int = 8
    outliers: float = 0.0
    low_rank: int = 0
    refine: int = 0
    distill: int = 0
    flips: bool = False
    rate: float = 1e-2
    target_bpw: float = 0.0
    target_ms: float = 0.0
    groups: str = ""
    head_bits: int = KEEP_BITS
    overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            wanted = type(FIELDS[name].default) if name != "overrides" else dict
            if wanted is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif type(value) is not wanted:
                raise LutqError(f"{name} must be of type {wanted.__name__}, not {value!r}")
        check_bits(self.bits)
        check_group(self.group)
        check_scale_bits(self.scale_bits)
        if self.head_bits != KEEP_BITS:
            check_bits(self.head_bits, "head_bits", f", or {KEEP_BITS} to keep the head as it is")
        for name, known in (("method", METHODS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise LutqError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name, least in (
            ("iterations", 0),
            ("calib_windows", 1),
            ("seed", 0),
            ("rounds", 0),
            ("sweeps", 0),
            ("low_rank", 0),
            ("learned_scaling", 0),
            ("refine", 0),
            ("distill", 0),
        ):
            if getattr(self, name) < least:
                raise LutqError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("tolerance", "damping", "rate"):
            if not 0 <= getattr(self, name) < 1:
                raise LutqError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if not 0 <= self.outliers <= MOST_OUTLIERS:
            raise LutqError(
                f"outliers must be a percentage up to {MOST_OUTLIERS}, where they cost a bit a weight; not {self.outliers}"
            )
        if not 0 <= self.target_bpw <= 16:
            raise LutqError(f"target_bpw must be a number of bits up to 16, or 0 for none; not {self.target_bpw}")
        if not 0 <= self.target_ms < math.inf:
            raise LutqError(f"target_ms must be a number of milliseconds, or 0 for none; not {self.target_ms}")
        if self.target_ms and (self.outliers or self.low_rank):
            name = "outliers" if self.outliers else "low_rank"
            raise LutqError(f"target_ms counts the products with planes and {name} adds others: leave one of the two out")
        for group in self.group_choices:
            check_group(group, "every one of groups")
        if self.groups and not self.mixed:
            raise LutqError(f"groups {self.groups!r} are for target_bpw and target_ms to choose from: give one of them, or group")
        if self.calib_length < 0 or self.calib_length == 1:
            raise LutqError(f"calib_length must be 2 or more, or 0 for the model's maximum; not {self.calib_length}")
        if self.method == "rtn" and (self.refine or self.distill):
            raise LutqError(f"{'refine' if self.refine else 'distill'} tunes BCQ grids and method is 'rtn': use another method")
        if self.end_loss and self.method != "feedback":
            raise LutqError(f"end_loss weighs the tokens of 'feedback' and method is {self.method!r}: leave one of the two out")
        if self.method == "rtn" and (self.scaling or self.learned_scaling):
            name = "scaling" if self.scaling else "learned_scaling"
            raise LutqError(f"{name} is for BCQ grids and method is 'rtn': use another method")
        for pattern, table in self.overrides.items():
            check_override(pattern, table)
        if self.lowest_bits:
            self._check_precisions()

    def _check_precisions(self) -> None:
        """Raise LutqError for settings that an any-precision checkpoint cannot have."""
        if not 1 <= self.lowest_bits < self.bits:
            raise LutqError(
                f"lowest_bits must be at least 1 and less than bits ({self.bits}), or 0 for one precision; not {self.lowest_bits}"
            )
        if self.method == "rtn":
            raise LutqError("lowest_bits adds planes to a BCQ grid and method is 'rtn': use feedback or alternating")
        if self.flips:
            raise LutqError("flips learns codes, which the precisions of lowest_bits share: leave one of the two out")
        if self.outliers or self.low_rank:
            name = "outliers" if self.outliers else "low_rank"
            raise LutqError(f"{name} corrects one precision and lowest_bits asks for several: leave one of the two out")
        others = [table["bits"] for table in self.overrides.values() if table.get("bits", self.bits) != self.bits]
        if self.mixed or others or self.head_bits not in (self.bits, KEEP_BITS):
            target = "target_ms" if self.target_ms else "target_bpw"
            raise LutqError(f"lowest_bits needs {self.bits} bits in every layer: leave out {target} and bits that differ")
        if 8 in (self.scale_bits, *(table.get("scale_bits") for table in self.overrides.values())):
            raise LutqError("lowest_bits stores scales in 16 bits and scale_bits is 8: leave one of the two out")

    @property
    def grid(self) -> str:
        """`uniform` or `bcq`: how a checkpoint of this method stores its levels."""
        return "uniform" if self.method == "rtn" else "bcq"

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text takes part."""
        stages = self.learned_scaling, self.refine, self.distill
        return self.method == "feedback" or self.scaling or max(stages) > 0

    @property
    def precisions(self) -> range:
        """Bits of the models that a checkpoint with the same bits in every layer serves."""
        return range(self.lowest_bits or self.bits, self.bits + 1)

    @property
    def tuned(self) -> bool:
        """Whether anything is tuned to what the original model computes."""
        return self.refine > 0 or self.distill > 0

    def at(self, bits: int) -> str:
        """Which of several precisions a figure is of, in words; nothing where there is one."""
        return f" at {bits} bits" if self.lowest_bits else ""

    @property
    def mixed(self) -> bool:
        """Whether bits per layer are chosen under a budget."""
        return self.target_bpw > 0 or self.target_ms > 0

    @property
    def group_choices(self) -> tuple[int, ...]:
        """`groups` as numbers, each once. Raises LutqError for what is no list of numbers."""
        try:
            return tuple(dict.fromkeys(int(part) for part in self.groups.split(","))) if self.groups else ()
        except ValueError as error:
            raise LutqError(f"groups must be numbers with commas between them, such as 32,64,128; not {self.groups!r}") from error

    def layer(self, name: str, is_head: bool = False) -> LayerConfig | None:
        """Settings of the Linear layer called `name`, or None where it is kept as it is."""
        keep_head = is_head and self.head_bits == KEEP_BITS
        bits = self.head_bits if is_head and not keep_head else self.bits
        settings = {"bits": bits, "group": self.group, "scale_bits": self.scale_bits}
        skip = False
        for pattern, table in self.overrides.items():
            if re.search(pattern, name):
                skip = table.get("skip", skip)
                keep_head = keep_head and not {"bits", "skip"} & table.keys()
                settings |= {key: value for key, value in table.items() if key != "skip"}
        if skip or keep_head:
            return None
        return LayerConfig(**settings, grid=self.grid, offsets=not self.symmetric if self.method == "rtn" else self.offsets)

    def corrections(self, name: str, N: int, K: int) -> dict[str, int]:
        """The fields of `LayerConfig` that depend on the size of the layer `name` [N, K]; one outlier per row at least.

        Raises LutqError where a low-rank correction would be larger than the layer in fp16.
        """
        if self.low_rank * (N + K) > N * K:
            most = N * K // (N + K)
            raise LutqError(f"low_rank is {self.low_rank} and {name} has {N} outputs of {K} inputs: use {most} at most")
        count = max(1, round(K * self.outliers / 100)) if self.outliers else 0
        return {"outliers_per_row": count, "low_rank": self.low_rank}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as saved in a checkpoint."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(QuantConfig)}


def format_version(modules: dict[str, dict[str, Any]]) -> int:
    """The version of a checkpoint with these `quantization_config.modules`."""
    return FORMAT_VERSION if all(fields.keys() <= set(FIRST_FIELDS) for fields in modules.values()) else LATER_VERSION


def check_bits(bits: Any, name: str = "bits", or_else: str = "") -> None:
    """Raise LutqError unless `bits` is 1, 2, 3 or 4, which lutq quantizes to."""
    if type(bits) is not int or not 1 <= bits <= 4:
        raise LutqError(f"{name} must be 1, 2, 3 or 4{or_else}; got {bits!r}")


def check_group(group: Any, name: str = "group") -> None:
    """Raise LutqError unless `group` is 0 or a multiple of 32."""
    if type(group) is not int or group < 0 or group % 32:
        raise LutqError(f"{name} must be a multiple of 32, or 0 for one group per row; got {group!r}")


def check_scale_bits(scale_bits: Any, name: str = "scale_bits") -> None:
    """Raise LutqError unless `scale_bits` is 16 or 8."""
    if type(scale_bits) is not int or scale_bits not in (16, 8):
        raise LutqError(f"{name} must be 16 or 8; got {scale_bits!r}")


def check_override(pattern: str, table: Any) -> None:
    """Raise LutqError unless `pattern` is a regular expression and `table` holds only bits, group, scale_bits and skip."""
    where = f"overrides.{pattern!r}"
    try:
        re.compile(pattern)
    except re.error as error:
        raise LutqError(f"{where} is not a regular expression ({error}): correct it") from error
    if not isinstance(table, dict) or not set(table) <= {"bits", "group", "scale_bits", "skip"}:
        raise LutqError(f"{where} takes the keys bits, group, scale_bits and skip; got {table!r}")
    if "bits" in table:
        check_bits(table["bits"], f"{where}.bits")
    if "group" in table:
        check_group(table["group"], f"{where}.group")
    if "scale_bits" in table:
        check_scale_bits(table["scale_bits"], f"{where}.scale_bits")
    if type(table.get("skip", False)) is not bool:
        raise LutqError(f"{where}.skip must be true or false; got {table['skip']!r}")


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Settings in a recipe: a path, or the name of one shipped in `configs/` (with or without `configs/` and `.toml`).

    Raises LutqError for a file that is missing, is not TOML, or has an unknown key.
    """
    path = Path(recipe)
    if not path.is_file() and path.parent in (Path(), Path("configs")) and path.suffix in ("", ".toml"):
        path = shipped("configs") / f"{path.stem}.toml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in shipped("configs").glob("*.toml")))
        raise LutqError(f"no recipe {str(recipe)!r}: give the path of a .toml file or one of {names}")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LutqError(f"recipe {path} is not valid TOML ({error}): correct it") from error
    unknown = sorted(set(settings) - set(FIELDS))
    if unknown:
        raise LutqError(f"recipe {path} has the unknown key {unknown[0]!r}; the keys are {', '.join(FIELDS)}")
    return settings


def make_config(recipe: str | Path | None = None, **flags: Any) -> QuantConfig:
    """Defaults, overridden by the recipe, overridden by every flag that is not None."""
    settings = read_recipe(recipe) if recipe is not None else {}
    return QuantConfig(**settings | {name: value for name, value in flags.items() if value is not None})
