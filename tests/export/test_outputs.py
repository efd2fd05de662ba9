"""A further output is a row of FURTHER_OUTPUTS and a field of Outputs; nothing else knows it by its name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from ffl_deploy.bundle import load_bundle
from ffl_deploy.manifest import OutputTensor
from ffl_deploy.run_directory import Run

# In a process of its own, since modules hold on to the class Outputs that they imported.
WITH_ENERGY = """
import sys
from collections import namedtuple

from export.outputs import FURTHER_OUTPUTS, FurtherOutput
from ffl_deploy.runtime import session

Outputs = session.Outputs
fields = [*Outputs._fields, "energy"]
session.Outputs = namedtuple("Outputs", fields, defaults=[None] * (len(fields) - 2))
for name in ("finite", "rows", "joined"):
    setattr(session.Outputs, name, Outputs.__dict__[name])

def energy(function):  # Liu et al. 2020, eq. 4
    return FurtherOutput("energy", "the energy", "log of the sum of exponentials", function)

right = energy(lambda values: values.logits.logsumexp(dim=1))
wrong = energy(lambda values: values.logits.amax(dim=1))
FURTHER_OUTPUTS["energy"] = right

import numpy as np
from export import formats
from export.cli import main
from ffl_deploy.bundle import load_bundle
from ffl_deploy.command import run_command

folder, out = sys.argv[1:]
write_onnx = formats.write_onnx
def write_wrong(*arguments):
    FURTHER_OUTPUTS["energy"] = wrong
    write_onnx(*arguments)
    FURTHER_OUTPUTS["energy"] = right
formats.write_onnx = write_wrong
assert run_command(main, [folder, "--target", "branch0", "--energy", "--out", out]) == 1
formats.write_onnx = write_onnx
assert run_command(main, [folder, "--target", "fused", "--energy", "--out", out]) == 0
bundle = load_bundle(f"{out}/fused")
np.save(f"{out}/energy.npy", bundle.session().run(bundle.golden().images).energy)
"""


def test_an_output_is_a_row_and_a_field(digits_run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITH_ENERGY, str(digits_run.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its output energy is off PyTorch's" in done.stderr  # of the graph that computed something else
    assert not (tmp_path / "branch0").exists()

    bundle = load_bundle(tmp_path / "fused")
    assert bundle.manifest.outputs[-1] == OutputTensor("energy", ["batch"], "log of the sum of exponentials")
    extras = bundle.variant().details.extras
    assert extras is not None
    assert extras["energy"] < 1e-4
    logits = bundle.session().run(bundle.golden().images).logits.astype(np.float64)
    np.testing.assert_allclose(
        np.load(tmp_path / "energy.npy"), np.log(np.exp(logits).sum(axis=1)), rtol=1e-4
    )
