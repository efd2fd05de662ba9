"""ffl-train --quantize-aware: a finished run -> a new run whose int8 file is what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ffl_deploy.command import run_command
from ffl_deploy.errors import Interrupted, UsageError
from ffl_deploy.networks.checkpoint import load_network
from ffl_deploy.networks.quantization import QuantizedNetwork
from ffl_deploy.run_directory import load_run
from tests.train.test_loop import assert_same_run, stop_after
from tests.train.test_processes import run
from train.methods import FFL, distill
from train.record import read_metrics
from train.run import main, parse
from train.teacher import TaughtOutputs, taught

BRANCHES = ("--branches", "resnet8,resnet8")


@pytest.fixture
def finished(train_tiny: Callable[..., Path]) -> Path:
    return train_tiny("finished", *BRANCHES)


def tensors(run: Path, checkpoint: str, stem: str = "quantization") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoint / f"{stem}.safetensors")


def fine_tune(run: Path, name: str, *flags: str) -> Path:
    out = run.parent / name
    assert main(["--quantize-aware", str(run), "--out", str(out), "--quiet", *flags]) == 0
    return out


def test_it_leaves_a_new_run_with_scales_and_the_weights_as_int8_has_them(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    run = load_run(fine_tune(finished, "int8", "--epochs", "2"))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    parts = read_metrics(run.folder)[0]["parts"]
    assert {"ce/fused", "ekd/fused", "fkd/branch1", "qkd/fused", "qkd/branch0", "qkd/branch1"} <= set(parts)
    best = load_network(run, "best").network
    quantized = QuantizedNetwork(best)
    quantized.load(tensors(run.folder, "best"), "best", as_written=True)
    for key, layer in quantized.layers.items():
        whole = layer.folded()[0].flatten(1) / layer.steps()[:, None]
        assert (whole - whole.round()).abs().max() < 1e-3, quantized.paths[key]
    # `last` goes on from weights between the steps
    latent = QuantizedNetwork(load_network(run, "last").network)
    spread = max(
        (layer.folded()[0].flatten(1) / layer.steps()[:, None]).frac().abs().max().item()
        for layer in latent.layers.values()
    )
    assert spread > 0.3
    # what summary.json says is what the deployed fp32 weights answer
    with np.load(run.folder / "test_predictions.npz") as answers:
        fused = float(np.mean(answers["fused"] == answers["labels"]))
    assert json.loads((run.folder / "summary.json").read_text())["accuracy"]["fused"] == pytest.approx(
        fused, abs=1e-6
    )


def test_stopped_in_an_epoch_and_resumed_without_its_origin_it_is_the_same_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fine_tune(finished, "whole", "--epochs", "2")
    with stop_after(monkeypatch, 5), pytest.raises(Interrupted):
        fine_tune(finished, "stopped", "--epochs", "2")
    stopped = finished.parent / "stopped"
    shutil.rmtree(finished)
    assert main(["--resume", str(stopped), "--quiet"]) == 0
    assert_same_run(stopped, expected)
    for checkpoint in ("last", "best"):
        a, b = tensors(stopped, checkpoint), tensors(expected, checkpoint)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_weights_learn_and_the_grids_of_activations_stay(finished: Path) -> None:
    run, teacher = fine_tune(finished, "learned", "--epochs", "2"), tensors(finished, "best", "model")
    after, best, last = tensors(run, "last"), tensors(run, "best"), tensors(run, "last", "model")
    assert all((value > 0).all() for name, value in after.items() if name.endswith("scale"))
    grids = [name for name in after if not name.endswith(".weight_scale")]
    assert len(grids) > 20
    assert all(torch.equal(after[name], best[name]) for name in grids)
    moved = [name for name in teacher if not torch.equal(teacher[name], last[name])]
    # statistics of batch normalisation stay
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias"}


def test_the_teacher_s_term_is_ffl_s_distillation() -> None:
    from ffl_deploy.networks.mutual import Outputs

    draw = torch.Generator().manual_seed(0)
    z = [torch.randn(4, 3, generator=draw) for _ in range(4)]
    outputs, labels = Outputs(z[:2], z[2], None, []), torch.tensor([0, 1, 2, 0])
    ffl = FFL()
    plain = ffl.losses(outputs, labels, 1.0)
    parts = taught(ffl, "qkd").losses(TaughtOutputs(outputs, z[3]), labels, 1.0)
    assert {name: parts[name] for name in plain} == plain
    for name, logits in (("branch0", z[0]), ("branch1", z[1]), ("fused", z[2])):
        assert torch.equal(parts[f"qkd/{name}"], distill(logits, z[3], 3.0))


def test_its_defaults_are_the_run_s_own_in_low_gear(finished: Path) -> None:
    trained, config = parse(["--resume", str(finished)]), parse(["--quantize-aware", str(finished)])
    assert config.data == trained.data
    assert config.model.branches == trained.model.branches
    assert config.optimisation.epochs == 1
    assert config.optimisation.lr == pytest.approx(trained.optimisation.lr / 200)
    assert config.optimisation.clip == 1.0
    assert config.machine.precision == "fp32"
    assert config.output.out is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--branches", "resnet14,resnet14"), "--branches is"),
        (("--method", "dml"), "--method is"),
        (("--validation", "0.3"), "--validation is"),
        (("--precision", "bf16"), "leave --precision out"),
        (("--ema", "0.9"), "leave --ema out"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    finished: Path, flags: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["--quantize-aware", str(finished), *flags]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_an_unfinished_or_missing_run_is_refused(finished: Path) -> None:
    (finished / "summary.json").unlink()
    with pytest.raises(UsageError, match="not finished"):
        main(["--quantize-aware", str(finished)])
    with pytest.raises(UsageError, match="no run directory"):
        main(["--quantize-aware", str(finished.parent / "nothing")])


@pytest.mark.slow
def test_two_processes_compute_what_one_accumulates(finished: Path) -> None:
    """The same micro-batches per step, once on two gloo processes, once one after the other;
    the grids are the same ones."""
    flags = ["--epochs", "2", "--batch-size", "16"]
    one = fine_tune(finished, "one", *flags, "--accumulate", "2")
    two = finished.parent / "two"
    done = run(*flags, "--quantize-aware", str(finished), "--out", str(two), "--quiet", processes=2)
    assert done.returncode == 0, done.stderr
    a, b = tensors(two, "last"), tensors(one, "last")
    assert all(torch.equal(a[name], b[name]) for name in a if not name.endswith(".weight_scale"))
    a, b = tensors(two, "last", "model"), tensors(one, "last", "model")
    assert a.keys() == b.keys()
    for name in a:  # gradients are added in another order, and a weight may then round to the next step
        assert torch.allclose(
            a[name].float(), b[name].float(), rtol=0, atol=1e-3 * float(b[name].float().abs().max())
        ), name
