"""Logits of the GPU against those of the CPU: what the gate of export would see."""

from __future__ import annotations

import copy
import importlib.util
import itertools

import torch

from benchmarks.gpu_acceptance.report import Context
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from train.build import converted
from train.config import MachineOptions
from train.distributed import World
from train.evaluate import logits_of
from train.machine import Place, choose_device

NETWORKS = ("resnet32", "wrn16_2", "torchvision:resnet18", "timm:mobilenetv3_small_050")
ALLOWED = 2e-5


def run(context: Context) -> None:
    context.need_gpu()
    device = choose_device(MachineOptions(device="cuda"), World())  # TF32, as for training
    for name in NETWORKS:
        if importlib.util.find_spec(name.partition(":")[0] if ":" in name else "torch") is None:
            context.report.leave_out(f"{name}: not installed here")
            continue
        torch.manual_seed(0)
        network = MutualNetwork(NetworkConfig((name, name), 100, 32, 32)).to(
            memory_format=torch.channels_last
        )
        if name.startswith("timm:"):
            network = converted(network.train())
        images = torch.randn(64, 3, 32, 32)
        expected = logits_of(copy.deepcopy(network), images)
        network = network.to(device)
        for benchmark, exact in itertools.product((False, True), repeat=2):
            torch.backends.cudnn.benchmark = benchmark
            if exact:
                with Place(device, "bf16").exact():
                    found = logits_of(network, images.to(device))
            else:
                found = logits_of(network, images.to(device))
            worst = max(
                float(abs(found[key] - expected[key]).max() / expected[key].std()) for key in expected
            )
            kind = f"{name}, {'without TF32' if exact else 'TF32'}, benchmark {'on' if benchmark else 'off'}"
            context.report.note(**{kind: worst})
            if exact:
                context.report.must(f"{kind}: at most {ALLOWED:.0e}", worst <= ALLOWED)
