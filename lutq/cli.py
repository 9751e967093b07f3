"""The command line: one function per verb, which imports its module only when called, so that `lutq --help` is instant.

A LutqError prints one sentence and exits with code 2; `--verbose` shows its traceback.
"""

import functools
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lutq import __version__
from lutq.config import FIELDS, METHODS, STARTS, make_config
from lutq.errors import LutqError, LutqWarning
from lutq.parallel.job import job

app = typer.Typer(
    name="lutq",
    help="Large language models in 1 to 4 bits: quantize, generate, measure perplexity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N; auto is the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="Of activations: float16, bfloat16, float32; auto is float32 on the CPU.")]
Backend = Annotated[str, typer.Option(help="Kernel of the quantized layers: auto, cuda, cpu or reference.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
Precision = Annotated[
    Optional[int], typer.Option("--bits", help="A precision that the checkpoint serves, see `lutq info`; default: the highest.")
]
Model = Annotated[str, typer.Option(help="Checkpoint directory, hub id, or opt-tiny (embedded).")]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Run a verb so that bad input ends in one sentence and exit code 2, and Ctrl-C in exit code 130; one of several processes
    of torchrun as lutq/parallel/job.py says.
    """

    @functools.wraps(function)
    def run(*args: Any, verbose: bool = False, **kwargs: Any) -> None:
        try:
            quiet_libraries()
            with warnings.catch_warnings(), job(function.__name__, kwargs.get("device", "auto"), verbose):
                warnings.showwarning = show_warning
                function(*args, verbose=verbose, **kwargs)
        except LutqError as error:
            if verbose:
                traceback.print_exc()
            typer.echo(f"lutq: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            hint = "; the same command goes on where it stopped" if function.__name__ == "quantize" else ""
            typer.echo(f"\nlutq: interrupted{hint}", err=True)
            raise typer.Exit(130) from None

    return run


def show_warning(message: Warning | str, category: type[Warning], file: str, line: int, *where: Any) -> None:
    """What lutq warns of as one sentence on standard error, what others do as Python shows it."""
    own = issubclass(category, LutqWarning)
    typer.echo(f"lutq: warning: {message}" if own else warnings.formatwarning(message, category, file, line), err=True, nl=own)


def quiet_libraries() -> None:
    """Silence the libraries' own progress bars and advice, which lutq replaces; their errors stay."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.set_verbosity_error()


def setting(name: str, text: str, flags: str | None = None) -> Any:
    """An option whose default is that of the QuantConfig field `name`: not given means "as in the recipe"."""
    default = FIELDS[name].default
    shown = {True: "yes", False: "no"}.get(default, default) if isinstance(default, bool) else default
    return typer.Option(*([flags] if flags else []), help=text, show_default=str(shown))


def print_version(wanted: bool) -> None:
    """`lutq --version`."""
    if wanted:
        typer.echo(f"lutq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Large language models in 1 to 4 bits: quantize, generate, measure perplexity."""


@app.command()
@verb
def quantize(
    model: Annotated[Optional[str], typer.Argument(help="Hub id or checkpoint directory; default: the embedded model.")] = None,
    bits: Annotated[Optional[int], setting("bits", "Bit-planes per weight, 1 to 4.")] = None,
    lowest_bits: Annotated[
        Optional[int], setting("lowest_bits", "Serve every precision from this to --bits; 0: that alone.")
    ] = None,
    group: Annotated[Optional[int], setting("group", "Inputs that share scales: a multiple of 32, or 0 for the row.")] = None,
    scale_bits: Annotated[Optional[int], setting("scale_bits", "Bits of each scale and offset, 16 or 8.")] = None,
    method: Annotated[Optional[str], setting("method", f"{', '.join(METHODS)}.")] = None,
    offsets: Annotated[Optional[bool], setting("offsets", "BCQ: one offset per group.", "--offsets/--no-offsets")] = None,
    symmetric: Annotated[Optional[bool], setting("symmetric", "rtn: no zero points.", "--symmetric/--asymmetric")] = None,
    clip: Annotated[Optional[bool], setting("clip", "rtn: search the clipping range.", "--clip/--no-clip")] = None,
    start: Annotated[Optional[str], setting("start", f"alternating: start from {', '.join(STARTS)}.")] = None,
    iterations: Annotated[Optional[int], setting("iterations", "alternating: rounds at most.")] = None,
    tolerance: Annotated[Optional[float], setting("tolerance", "alternating: stop when a round gains less.")] = None,
    calib: Annotated[
        Optional[str],
        setting("calib", "Calibration text: books, own (what the model writes itself), wikitext2, c4, ptb (train), or a file."),
    ] = None,
    calib_windows: Annotated[Optional[int], setting("calib_windows", "Windows of it.")] = None,
    calib_length: Annotated[
        Optional[int], setting("calib_length", "Tokens in each; 0 is the model's maximum, up to 2048.")
    ] = None,
    seed: Annotated[Optional[int], setting("seed", "Chooses the windows and their order.")] = None,
    scaling: Annotated[
        Optional[bool], setting("scaling", "Scale input channels, folded into the layers before.", "--scaling/--no-scaling")
    ] = None,
    learned_scaling: Annotated[
        Optional[int], setting("learned_scaling", "Passes over the windows that learn such scales.")
    ] = None,
    damping: Annotated[Optional[float], setting("damping", "feedback: part of the mean added to a Hessian's diagonal.")] = None,
    end_loss: Annotated[
        Optional[bool], setting("end_loss", "feedback: weigh tokens by their part in the end loss.", "--end-loss/--no-end-loss")
    ] = None,
    rounds: Annotated[Optional[int], setting("rounds", "feedback: refits of each group's grid.")] = None,
    sweeps: Annotated[Optional[int], setting("sweeps", "feedback: sweeps of coordinate descent at the end.")] = None,
    outliers: Annotated[
        Optional[float], setting("outliers", "Percent of the weights corrected in fp16 beside the planes.")
    ] = None,
    low_rank: Annotated[Optional[int], setting("low_rank", "Rank of a correction by two thin fp16 matrices.")] = None,
    refine: Annotated[Optional[int], setting("refine", "Passes over the windows that tune each block's scales.")] = None,
    distill: Annotated[Optional[int], setting("distill", "Passes over the windows that tune all scales end to end.")] = None,
    flips: Annotated[Optional[bool], setting("flips", "refine and distill learn the codes too.", "--flips/--no-flips")] = None,
    rate: Annotated[Optional[float], setting("rate", "Largest step of a scale in refine and distill, relative.")] = None,
    target_bpw: Annotated[Optional[float], setting("target_bpw", "Choose bits per layer so that the average is this.")] = None,
    target_ms: Annotated[
        Optional[float], setting("target_ms", "Choose bits per layer so that the products of a token take so many ms here.")
    ] = None,
    groups: Annotated[Optional[str], setting("groups", "Choose the group too, from such as 32,64,128.")] = None,
    head_bits: Annotated[Optional[int], setting("head_bits", "Bits of the output head; 16 keeps it as it is.")] = None,
    recipe: Annotated[Optional[str], typer.Option(help="Settings from configs/NAME.toml; flags override them.")] = None,
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("lutq-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, drop an unfinished run.")] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of kept tensors; auto: as in the source, float16 for float32.")] = "auto",
    backend: Backend = "auto",
    verbose: Verbose = False,
) -> None:
    """Quantize a model and write it to a directory. Interrupted, the same command goes on where it stopped."""
    settings = {name: value for name, value in locals().items() if name in FIELDS}
    config = make_config(recipe, **settings)
    from lutq.ops import choose_backend
    from lutq.quantize import quantize_checkpoint
    from lutq.runtime import resolve_device

    choose_backend(backend, resolve_device(device))
    report = quantize_checkpoint(model, out, config, device=device, dtype=dtype, overwrite=overwrite)
    typer.echo(report.summary())


@app.command()
@verb
def convert(
    model: Annotated[str, typer.Argument(help="Hub id or directory of a GPTQ, AWQ, AutoRound or compressed-tensors checkpoint.")],
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("lutq-out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint that another program quantized to 2, 3, 4 or 8 bits, its weights unchanged."""
    from lutq.convert import convert_checkpoint

    typer.echo(convert_checkpoint(model, out, overwrite=overwrite).summary())


@app.command()
@verb
def generate(
    prompt: Annotated[Optional[str], typer.Argument(help="The text to continue; - or nothing: standard input.")] = None,
    model: Model = "lutq-out",
    bits: Precision = None,
    file: Annotated[Optional[Path], typer.Option(help="Read the prompt from a file.")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Every line is a prompt of its own; prints a line of JSON for each.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0 is all.")] = 50,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    engine: Annotated[str, typer.Option(help="auto, fast (OPT and LLaMA), graph, or plain.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    from lutq.parallel.ranks import current

    text = current().same(lambda: read_prompt(prompt, file))
    from lutq.decode.choose import check_engine
    from lutq.generate import Generation, Sampling, generate_many
    from lutq.generate import generate as run
    from lutq.hf import load
    from lutq.source import locate
    from lutq.tokens import load_tokenizer

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    check_engine(engine)
    loaded = load(model, device=device, dtype=dtype, backend=backend, bits=bits)
    tokenizer = load_tokenizer(locate(model)[0])
    if lines:
        prompts, begin = [line.rstrip("\r") for line in text.split("\n") if line.strip()], []

        def done(one: str, result: Generation) -> None:
            typer.echo(json.dumps({"prompt": one, "text": result.text}, ensure_ascii=False))

        results = generate_many(
            loaded, tokenizer, prompts, sampling, chat, engine, lambda: begin.append(time.perf_counter()), done
        )
        seconds = time.perf_counter() - begin[0]
        new = sum(result.new_tokens for result in results)
        typer.echo(f"[{len(prompts)} prompts; {new} tokens, {new / seconds:.1f} tokens/s; {results[0].how()}]", err=True)
        return
    say = functools.partial(typer.echo, nl=False)
    result = run(loaded, tokenizer, text, sampling, chat, say, engine, ready=lambda: None if chat else say(text))
    typer.echo("")
    typer.echo(f"[{result.summary()}]", err=True)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, the file, or standard input. Raises LutqError."""
    if prompt is not None and file is not None:
        raise LutqError("give the prompt or --file, not both")
    if file is not None:
        from lutq.data import read_text

        return read_text(file).rstrip("\n")
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise LutqError('there is no prompt: lutq generate "Once upon a time", --file FILE, or text on standard input')
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        raise LutqError("the prompt is empty: give some text, --file FILE, or text on standard input")
    return prompt


@app.command("eval-ppl")
@verb
def eval_ppl(
    dataset: Annotated[str, typer.Argument(help="wikitext2 (embedded), c4, ptb, or a text file.")] = "wikitext2",
    model: Model = "lutq-out",
    bits: Precision = None,
    baseline: Annotated[Optional[str], typer.Option(help="A second model to compare with, measured first.")] = None,
    protocol: Annotated[str, typer.Option(help="gptq, raw, or context-N.")] = "gptq",
    max_windows: Annotated[Optional[int], typer.Option(help="Measure the first windows only.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the results to this file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    verbose: Verbose = False,
) -> None:
    """Measure perplexity of a quantized or plain model."""
    from lutq.evaluate import compare, evaluate

    results = evaluate(dataset, model, baseline, protocol, max_windows, json_file, device, dtype, backend, bits=bits)
    typer.echo(compare(results))


@app.command()
@verb
def info(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or opt-tiny (embedded).")] = "lutq-out",
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    verbose: Verbose = False,
) -> None:
    """Say what a checkpoint is, its bits per weight, and which backend would run it here."""
    from lutq.info import describe

    typer.echo(describe(model, device, dtype, backend))


@app.command()
@verb
def build(
    arch: Annotated[
        Optional[list[str]],
        typer.Option(
            help="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 (machine code), compute_80 (PTX, for later GPUs) or all of these; "
            "repeatable. Default: the GPUs here; where there are none, all."
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="Write lutq_cuda.so to this directory instead of the cache.")] = None,
    verbose: Verbose = False,
) -> None:
    """Compile the CUDA kernels ahead of their first use."""
    from lutq.build import build as run
    from lutq.compiler import FAT_ARCHS, native_arch
    from lutq.doctor import gpus
    from lutq.runtime import size

    made = run(arch or [native_arch(gpu.capability) for gpu in gpus()] or FAT_ARCHS, out)
    typer.echo(f"{made.path}: {size(made.path.stat().st_size)} for {', '.join(made.archs)}, compiled in {made.seconds:.1f} s")


@app.command()
@verb
def doctor(verbose: Verbose = False) -> None:
    """Say what this machine has, which kernels will run on it, and what to do about what is missing."""
    from lutq.doctor import diagnose

    lines, healthy = diagnose()
    typer.echo("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
@verb
def kernel(
    shape: Annotated[
        Optional[list[str]], typer.Option(help="Outputs x inputs, 4096x14336; repeatable. Default: six layers of LLMs.")
    ] = None,
    rows: Annotated[Optional[list[int]], typer.Option(help="Rows of x; repeatable. Default: 1, 2, 4, ... 2048.")] = None,
    bits: Annotated[Optional[list[int]], typer.Option(help="Bits per weight; repeatable. Default: 2, 3, 4.")] = None,
    grid: Annotated[str, typer.Option(help="bcq, uniform; auto is bcq at 1 to 3 bits and uniform at 4.")] = "auto",
    group: Annotated[int, typer.Option(help="Inputs that share scales: a multiple of 32, or 0 for the row.")] = 128,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the results into this .png (needs matplotlib).")] = None,
    repeats: Annotated[int, typer.Option(help="Times to measure each figure; the median counts.")] = 20,
    tune: Annotated[bool, typer.Option("--tune", help="Find from how many rows dequantizing is faster, and keep that.")] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:N; auto is the current GPU.")] = "auto",
    verbose: Verbose = False,
) -> None:
    """Check the CUDA kernels and time them, beside the memory's read ceiling and cuBLAS in fp16."""
    if tune:
        if shape or rows or bits or json_file or plot or (grid, group) != ("auto", 128):
            raise LutqError("--tune measures layers and rows of its own and writes its own file: give it alone")
        from lutq.tune import tune as run

        run(repeats, device, typer.echo)
        return
    from lutq.bench import bench as run

    run(shape, rows, bits, grid, group, json_file, plot, repeats, device, typer.echo)


@bench.command()
@verb
def decode(
    shape: Annotated[
        Optional[list[str]], typer.Option(help="A model config (JSON), or a name in configs/models; repeatable.")
    ] = None,
    bits: Annotated[Optional[list[int]], typer.Option(help="Bits per weight, or 16; repeatable. Default: 3.")] = None,
    group: Annotated[int, typer.Option(help="Inputs that share scales: a multiple of 32, or 0 for the row.")] = 128,
    grid: Annotated[str, typer.Option(help="bcq, uniform; auto is bcq at 1 to 3 bits and uniform at 4.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens that a step attends to.")] = 512,
    batch: Annotated[Optional[list[int]], typer.Option(help="Sequences; repeatable. Default: 1.")] = None,
    engine: Annotated[str, typer.Option(help="fast or graph.")] = "fast",
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Random weights: what a shape has anyway.")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the results into this .png (needs matplotlib).")] = None,
    replays: Annotated[int, typer.Option(help="Steps to time, 100 or more.")] = 200,
    device: Annotated[str, typer.Option(help="cuda, cuda:N; auto is the current GPU.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of activations: float16 or bfloat16.")] = "float16",
    verbose: Verbose = False,
) -> None:
    """Time whole decode steps of models with random weights, which need no checkpoint."""
    from lutq.decode.bench import bench as run

    run(shape, bits, group, grid, context, batch, engine, json_file, plot, replays, device, dtype, typer.echo)


def main() -> None:
    """Entry point of the console script."""
    app()
