"""Weights of tokens against differences of the loss and of the divergence in float64, and the Hessians made with them."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import Crash
from safetensors.torch import load_file, save_file

from lutq import blocks, calibrate, endloss
from lutq.blocks import Blocks
from lutq.config import QuantConfig
from lutq.endloss import hessians, normalized, squared_gradients, token_weights
from lutq.errors import LutqError
from lutq.hf import load
from lutq.quantize import quantize_checkpoint

SMALL = {"bits": 2, "group": 32, "method": "feedback", "calib_windows": 3, "calib_length": 48, "rounds": 1, "sweeps": 1}
SMALL |= {"iterations": 2, "end_loss": True}
CPU = torch.device("cpu")


def walk_of(folder):
    return Blocks(load(folder, device="cpu", dtype="float32"), CPU)


def linears(walk):
    return [name for name, m in walk.model.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith(walk.prefix)]


def tokens(n, L, seed=0):
    return torch.randint(3, 4000, (n, L), generator=torch.Generator().manual_seed(seed))


def moved(model, name, step, windows):
    """Logits of a model in float64 when `step` is added to the outputs of a layer."""
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, z: z + step.view(-1, *z.shape[1:]))
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize(
    ("family", "layer"),
    [("opt", "0.fc2"), ("opt", "1.fc1"), ("llama", "0.self_attn.k_proj"), ("llama", "1.mlp.up_proj"), ("opt-postnorm", "0.fc2")],
)
def test_squares_are_those_of_differences_of_the_loss(tiny, family, layer, monkeypatch):
    walk, windows, drawn = walk_of(tiny(family)), tokens(3, 6), []
    draw = endloss.draw
    monkeypatch.setattr(endloss, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    monkeypatch.setattr(endloss, "TOKENS", 12)  # two batches
    names = linears(walk)
    got = squared_gradients(walk, windows, names, seed=0)
    assert list(got) == names
    labels, model, name = torch.cat(drawn), walk.model.double(), f"{walk.prefix}.{layer}"
    N, (n, L), eps = model.get_submodule(name).out_features, windows.shape, 1e-3  # LLaMA's norms compute in fp32 even so
    for window, t in ((0, 0), (2, 3)):
        step = torch.zeros(N, L, N, dtype=torch.float64)  # one output at a time, all in a batch
        step[torch.arange(N), t, torch.arange(N)] = eps
        inputs, targets = windows[window].expand(N, -1), labels.view(n, L)[window].expand(N, -1)
        logits = [moved(model, name, sign * step, inputs).transpose(1, 2) for sign in (1, -1)]
        above, below = (F.cross_entropy(values, targets, reduction="none").sum(1) for values in logits)
        gradient = (above - below) / (2 * eps)
        expected = gradient.square().mean().item()
        assert got[name][window, t].item() == pytest.approx(expected, rel=2e-3), f"{family=} {layer=} {window=} {t=}"


def test_mean_square_is_the_curvature_of_the_divergence(tiny):
    # many draws for one window, against the divergence that random errors of the outputs cause
    walk, window, name, draws = walk_of(tiny("llama")), tokens(1, 4), "model.layers.0.mlp.down_proj", 1024
    s = squared_gradients(walk, window.expand(draws, -1), [name], seed=0)[name].mean(0)
    model, random, eps = walk.model.double(), torch.Generator().manual_seed(1), 1e-3
    N = model.get_submodule(name).out_features
    for t in (0, 2):
        step = torch.zeros(512, 4, N, dtype=torch.float64)
        step[:, t] = eps * torch.randn(512, N, generator=random, dtype=torch.float64)
        with torch.no_grad():
            log_p = model(window, use_cache=False).logits.log_softmax(-1)
        log_q = moved(model, name, step, window.expand(512, -1)).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum((1, 2)).mean().item()
        assert eps**2 * N * s[t].item() / 2 == pytest.approx(divergence, rel=0.15), f"{t=}"


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_weighted_hessians_are_the_sums_written_out(tiny, family, monkeypatch):
    monkeypatch.setattr(blocks, "TOKENS", 20)  # two windows at a time
    walk, windows = walk_of(tiny(family)), tokens(5, 9)
    weights = token_weights(walk, windows, linears(walk), seed=0)
    hidden = walk.embed(windows)
    for stage in blocks.input_stages(walk, 0, hidden):
        x = []
        hook = walk.blocks[0].get_submodule(stage[0]).register_forward_pre_hook(lambda _, inputs, x=x: x.append(inputs[0]))
        walk.through(walk.blocks[0], 0, hidden)
        hook.remove()
        x = torch.cat([part.flatten(0, -2) for part in x]).double()
        assert len(x) == windows.numel()
        weighted = hessians(walk, 0, hidden, stage, weights)
        assert [names for names, _ in weighted] == [[name] for name in stage]
        for (name,), H in weighted:
            s = weights[f"{walk.name(0)}.{name}"].double().flatten()
            expected = sum(s[t] * torch.outer(x[t], x[t]) for t in range(len(x))) / s.sum()
            error = ((H - expected).norm() / expected.norm()).item()
            assert error < 1e-5, f"{family=} {name=} {error=}"
        ((names, plain),) = hessians(walk, 0, hidden, stage, {})
        expected = x.T @ x / len(x)
        error = ((plain - expected).norm() / expected.norm()).item()
        assert names == stage
        assert error < 1e-5, f"{family=} {stage=} {error=}"


def test_weights_have_mean_one():
    s = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-60  # below what fp32 holds
    weights = normalized(s, "fc1")
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), s / s.mean())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_gradients_are_one_sentence(value):
    s = torch.ones(2, 3, dtype=torch.float64)
    s[1, 1] = value
    with pytest.raises(LutqError, match="the gradients of fc1 are NaN or infinite on the calibration text: leave end_loss out"):
        normalized(s, "fc1")


def changed(folder, out, key, value):
    """A copy of a model with one tensor filled."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    state[key][:] = value
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_bad_predictions_are_one_sentence(tiny, tmp_path):
    model = changed(tiny("llama"), tmp_path / "model", "model.layers.1.input_layernorm.weight", 3e38)
    with pytest.raises(LutqError, match="the model's predictions are NaN or infinite on the calibration text"):
        quantize_checkpoint(model, tmp_path / "out", QuantConfig(**SMALL), device="cpu", dtype="float32")


def test_layer_that_the_loss_does_not_feel(tiny, tmp_path, capsys):
    model = changed(tiny("llama"), tmp_path / "model", "model.layers.1.mlp.down_proj.weight", 0.0)
    quantize_checkpoint(model, tmp_path / "out", QuantConfig(**SMALL), device="cpu", dtype="float32")
    told = [line for line in capsys.readouterr().err.splitlines() if "does not feel" in line]
    assert [line.split()[7] for line in told] == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")], told


def test_layer_that_sees_tokens_twice(tiny):
    walk = walk_of(tiny("opt"))
    attention = walk.blocks[0].self_attn
    attention.k_proj = attention.q_proj
    with pytest.raises(LutqError, match=r"end_loss needs layers that see every token once, and .*0\.self_attn\.q_proj does not"):
        squared_gradients(walk, tokens(2, 6), [f"{walk.name(0)}.self_attn.q_proj"], seed=0)


def test_source_changed_behind_the_weights(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    with monkeypatch.context() as patch:

        def dying(*_):
            raise Crash

        patch.setattr(calibrate, "solve_layers", dying)
        with pytest.raises(Crash):
            quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantConfig(**SMALL), device="cpu")
    assert (tmp_path / "out.partial" / "calibration" / "end-loss").exists()
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1e-3  # block 0, which is solved first, is what it was
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LutqError, match=r"the source changed since the unfinished run in .* \(at block 1\)"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantConfig(**SMALL), device="cpu")
