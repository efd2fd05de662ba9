"""Two processors that compute otherwise are never described alike."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ffl_deploy import processor
from ffl_deploy.processor import kernels
from ffl_deploy.runtime import import_onnxruntime

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon
stepping\t: 8
microcode\t: 0x1
cpu MHz\t\t: {speed}
flags\t\t: fpu avx2 {flags}
bogomips\t: 5000.00

processor\t: 1
vendor_id\t: Another
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for function in (processor.cpuinfo, processor.features, processor.pair_sum):
        function.cache_clear()
    yield
    for function in (processor.cpuinfo, processor.features, processor.pair_sum):
        function.cache_clear()


def read(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.cpuinfo.cache_clear()
    return processor.cpuinfo()


def test_cpuinfo_says_what_it_is_and_not_how_fast_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vnni = read(X86.format(speed=2100, flags="avx512_vnni"), monkeypatch, tmp_path)
    assert vnni.splitlines()[0] == "vendor_id: GenuineIntel"
    assert vnni.splitlines()[-1] == "flags: fpu avx2 avx512_vnni"
    assert "Another" not in vnni
    assert read(X86.format(speed=3900, flags="avx512_vnni"), monkeypatch, tmp_path) == vnni
    assert read(X86.format(speed=2100, flags=""), monkeypatch, tmp_path) != vnni
    assert read(ARM, monkeypatch, tmp_path).splitlines() == [
        "Features: fp asimd asimddp",
        "CPU implementer: 0x41",
        "CPU architecture: 8",
        "CPU variant: 0x3",
        "CPU part: 0xd0c",
        "CPU revision: 1",
    ]


def test_without_cpuinfo_the_rest_still_describes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    described = kernels("openvino")
    assert described is not None
    assert described["cpuinfo"] == ""
    assert described["machine"]
    assert described["features"]


def test_a_users_switch_is_part_of_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = kernels("openvino")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    after = kernels("openvino")
    assert before is not None
    assert after == before | {"switches": (before["switches"] + " ONEDNN_MAX_CPU_ISA=SSE41").strip()}


def test_the_product_is_computed_by_the_int8_kernels() -> None:
    """Small factors cannot saturate: they are exact everywhere, so the file says what it is said to say."""
    session = import_onnxruntime().InferenceSession(processor.PAIR, providers=["CPUExecutionProvider"])
    for a, b in ((1, 1), (3, 200), (0, 255)):
        (found,) = session.run(["y"], {"a": np.array([[a, b]], np.uint8)})
        assert found.tolist() == [[127 * (a + b)]]
    assert processor.pair_sum() in ("64770", "32767")
    assert kernels("onnxruntime") == {**(kernels("openvino") or {}), "pair_sum": processor.pair_sum()}


def test_a_gpu_is_described_by_its_driver_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processor, "NVIDIA", tmp_path)
    assert [kernels(name) for name in ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")] == [None] * 3
    (tmp_path / "version").write_text("NVRM version: 570.1\n")
    assert kernels("tensorrt") is None, "a driver without a GPU"
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text(
        "Model: \t\t H100\nIRQ:   \t\t 7\nGPU UUID: \t GPU-1\n"
    )
    described = kernels("tensorrt")
    assert described is not None
    assert described["gpu"].splitlines() == ["NVRM version: 570.1", "Model: \t\t H100", "GPU UUID: \t GPU-1"]


@pytest.mark.slow
def test_an_emulated_processor_is_another_one() -> None:
    """Under qemu-user the system describes the host: NumPy and the kernels themselves do not."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None or platform.machine() != "x86_64":
        pytest.skip("qemu-user is not installed, or this Python is none that it runs")
    script = (
        "import json; from ffl_deploy.processor import kernels; print(json.dumps(kernels('onnxruntime')))"
    )
    found = []
    for cpu in ("Nehalem", "Haswell"):
        command = [qemu, "-cpu", cpu, sys.executable, "-c", script]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    nehalem, haswell = found
    assert nehalem["cpuinfo"] == haswell["cpuinfo"] == processor.cpuinfo()
    assert ("AVX2" in nehalem["features"], "AVX2" in haswell["features"]) == (False, True)
    assert (nehalem["pair_sum"], haswell["pair_sum"]) == ("64770", "32767")


@pytest.mark.parametrize(
    ("machine", "features", "pairs", "said"),
    [
        ("x86_64", "AVX AVX2 SSE42", "32767", "x86_64 AVX2, int8 pairs saturate"),
        ("x86_64", "AVX AVX2 AVX512F SSE42", "64770", "x86_64 AVX-512, int8 pairs exact"),
        ("x86_64", "SSE42", "64770", "x86_64 SSE4.2, int8 pairs exact"),
        ("aarch64", "ASIMD NEON", "64770", "aarch64 NEON, int8 pairs exact"),
        ("riscv64", "", "ImportError", "riscv64, int8 pairs not known"),
    ],
)
def test_the_description_says_what_decides_and_no_name(
    machine: str, features: str, pairs: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # the caches of the real functions are cleared behind every test
        patched.setattr(platform, "machine", lambda: machine)
        patched.setattr(processor, "features", lambda: features)
        patched.setattr(processor, "pair_sum", lambda: pairs)
        assert processor.description() == said
