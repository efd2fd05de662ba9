"""Bundles on other processors: qemu-user runs this environment on a CPU without VNNI (Haswell)
and one without AVX (Nehalem)."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EMULATOR = "qemu-x86_64"
OWN_KERNELS = ("-U", "OPENBLAS_CORETYPE")  # what this machine's NumPy is told is not for the other CPU
EXAMPLES = Path(__file__).parents[1] / "examples" / "cifar100"
PROCESSORS = ("native", "Haswell", "Nehalem")

pytestmark = pytest.mark.processor


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fused` of a short run on the digits, trained and exported on this processor,
    in every form that its CPU can verify."""
    root = tmp_path_factory.mktemp("digits")
    flags = [
        "--epochs",
        "4",
        "--branches",
        "resnet8,resnet8",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--quiet",
    ]
    run([sys.executable, "-m", "train.run", *flags, "--out", str(root / "run")])
    forms = ["--precision", "fp16", "--precision", "int8"]
    run(
        [
            sys.executable,
            "-m",
            "export.cli",
            str(root / "run"),
            "--target",
            "fused",
            *forms,
            "--out",
            str(root / "bundles"),
        ]
    )
    return root / "bundles" / "fused"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def verified_on(processor: str, bundle: Path) -> str:
    """-> what ffl-verify says of `bundle` there. Skips where the processor cannot be emulated."""
    command = [sys.executable, "-m", "ffl_deploy.verify", str(bundle)]
    if processor != "native":
        if platform.machine() != "x86_64":
            pytest.skip("the emulator runs this environment, which is not for x86-64")
        if shutil.which(EMULATOR) is None:
            pytest.skip(f"{EMULATOR} is not installed (Debian: apt-get install qemu-user)")
        command = [EMULATOR, *OWN_KERNELS, "-cpu", processor, *command]
    return run(command)


@pytest.mark.parametrize("target", ["fused", "branch0"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_committed_bundle_is_right_there(processor: str, target: str) -> None:
    said = verified_on(processor, EXAMPLES / target)
    with np.load(EXAMPLES / target / "golden.npz") as golden:
        images = len(golden["images"])
    for variant in ("fp32", "int8"):
        assert f"{variant} on onnxruntime: {images} images" in said
    assert said.count("gate passed") >= 2


@pytest.mark.xdist_group("digits")  # one process trains
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_fresh_bundle_is_right_there(processor: str, digits_bundle: Path) -> None:
    said = verified_on(processor, digits_bundle)
    for variant in ("fp32", "fp16", "int8"):
        (images,) = re.findall(rf"^{variant} on onnxruntime: (\d+) images", said, re.M)
        assert int(images) >= 64
    assert said.count("gate passed") >= 3
