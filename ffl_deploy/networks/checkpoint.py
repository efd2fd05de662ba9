"""Weights and training state on disk: safetensors and JSON, written atomically, never pickle.

checkpoints/NAME/  model.safetensors  [optimizer.safetensors ...]  state.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ffl_deploy.errors import CheckError
from ffl_deploy.files import replace_folder, sha256_of, write_atomically
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig
from ffl_deploy.run_directory import Run

MODEL = "model"
QUANTIZATION = "quantization"  # scales that training learned, where it was quantization-aware
STATE = "state.json"


class Checkpoint(NamedTuple):
    """tensors: file stem -> name -> tensor, on the CPU; state: what `state.json` holds."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class LoadedNetwork(NamedTuple):
    """A run's network in eval mode, and where its weights come from."""

    network: MutualNetwork
    epoch: int
    sha256: str


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Replace `folder` by a new checkpoint. A kill at any instant leaves the old or the new one whole."""
    with replace_folder(folder) as new:
        hashes = {}
        for stem, named in tensors.items():
            # Dense copies: a safetensors file has no notion of strides or shared storage.
            contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
            write_atomically(new / f"{stem}.safetensors", save_tensors(contiguous))
            hashes[stem] = sha256_of(new / f"{stem}.safetensors")
        write_atomically(
            new / STATE, msgspec.json.format(msgspec.json.encode({**state, "sha256": hashes}), indent=1)
        )


def read_checkpoint(folder: Path, stems: tuple[str, ...] | None = None) -> Checkpoint:
    """Read a checkpoint and check its hashes; `stems` limits which files are read. Raises CheckError."""
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=dict[str, Any])
        tensors = {}
        for stem in stems or tuple(state["sha256"]):
            path = folder / f"{stem}.safetensors"
            if sha256_of(path) != state["sha256"][stem]:
                raise CheckError(
                    f"{path} is damaged (its SHA-256 differs); use another checkpoint of this run."
                )
            tensors[stem] = load_tensors(path.read_bytes())
    except (OSError, KeyError, TypeError, msgspec.DecodeError, SafetensorError) as error:
        raise CheckError(
            f"the checkpoint {folder} is damaged ({error}); use another checkpoint of this run."
        ) from error
    return Checkpoint(tensors, state)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Load every weight of `module`, all of them and no others.
    Raises CheckError that names the first differences."""
    own = module.state_dict()
    wrong = [f"{name} missing" for name in own if name not in tensors]
    wrong += [f"{name} unexpected" for name in tensors if name not in own]
    wrong += [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckError(
            f"{origin} belongs to another architecture ({'; '.join(wrong[:3])}{more}); "
            "use the checkpoint together with its own run's config.json."
        )
    module.load_state_dict(dict(tensors))


def build_network(run: Run) -> MutualNetwork:
    """-> the run's network with fresh weights."""
    return MutualNetwork(network_config(run))


def network_config(run: Run) -> NetworkConfig:
    """-> the architecture from the run's configuration. Raises CheckError where it is damaged."""
    try:
        return msgspec.convert(run.model.network, NetworkConfig)
    except msgspec.ValidationError as error:
        raise CheckError(
            f"{run.folder}/config.json describes no valid network ({error}); train again."
        ) from error


def load_network(run: Run, checkpoint: str = "best") -> LoadedNetwork:
    """-> the network of `run` with the weights of `checkpoint` (best, last, ema), in eval mode."""
    folder = run.checkpoint(checkpoint)
    content = read_checkpoint(folder, (MODEL,))
    network = build_network(run)
    load_weights(network, content.tensors[MODEL], str(folder))
    return LoadedNetwork(network.eval(), int(content.state["epoch"]), content.state["sha256"][MODEL])
