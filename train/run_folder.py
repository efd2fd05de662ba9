"""The folder of a training run: which one it is, that no other process trains there,
that a resumed run is the same run."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch

from ffl_deploy.data.inputs import FILE, Inputs, changed_files
from ffl_deploy.errors import UsageError
from ffl_deploy.files import remove_all_abandoned
from ffl_deploy.run_directory import CONFIG, PREDICTIONS, REFERENCE, SUMMARY, RunConfig
from train.config import TrainConfig
from train.distributed import World

WRITTEN = (
    "checkpoints",
    SUMMARY,
    REFERENCE,
    PREDICTIONS,
    "metrics.jsonl",
    "curves.png",
    "tensorboard",
    "mlruns",
    "mlflow-run",
    "wandb",
    "wandb-run",
)
"""What a run writes beside its configuration."""


def run_folder(config: TrainConfig, world: World) -> Path:
    """-> the run directory that is resumed, named or made up; `claim` creates it.
    Raises UsageError where it cannot be new."""
    if config.output.resume is not None:
        return config.output.resume
    name = f"{Path(config.data.source).name}-{config.model.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(world.agree(str(config.output.out or Path("runs") / name)))
    if world.is_main and config.output.out is not None:
        require_new(folder)
    world.barrier()
    return folder


def require_new(folder: Path) -> None:
    """Raise UsageError where a new run would overwrite another one,
    or be mixed up with what is left of one."""
    if (folder / CONFIG).exists():
        raise UsageError(
            f"{folder} already holds a run; continue it with --resume {folder}, or choose another --out."
        )
    taken = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if taken:
        raise UsageError(
            f"{folder} holds {', '.join(taken)} but no {CONFIG}, so it is not known whose they are; move "
            "them away, or choose another --out."
        )


def claim(folder: Path, config: TrainConfig, world: World, held: ExitStack) -> Path:
    """-> the folder, which no other process trains in until `held` is closed.
    Raises UsageError where one does.

    A made-up name that was taken since gets a number.
    """
    if world.is_main:
        made_up = config.output.out is None and config.output.resume is None
        names = (
            (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
            if made_up
            else iter(())
        )
        while not (lock(folder, held) and (config.output.resume or not (folder / CONFIG).exists())):
            following = next(names, None)
            if following is None:
                raise UsageError(f"another process trains in {folder}; wait for it, or choose another --out.")
            folder = following
        for one in (folder, folder / "checkpoints"):  # the last save before a kill has no next one to tidy up
            remove_all_abandoned(one)
    return Path(world.agree(str(folder)))


def lock(folder: Path, held: ExitStack) -> bool:
    """Lock the folder itself, which leaves no file behind and ends with the process;
    -> whether nobody else had."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _LOCKS.add(descriptor)
    held.callback(_release, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


_LOCKS: set[int] = set()


def _release(descriptor: int) -> None:
    _LOCKS.discard(descriptor)
    os.close(descriptor)


def _let_go_in_child() -> None:
    """A lock belongs to all processes that have its file open: those that decode images would hold it for
    seconds after the run was killed, and --resume would be refused."""
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def wanted_precision(config: TrainConfig, stored: RunConfig | None) -> str:
    """-> --precision; a resumed run (`stored`) goes on in the one it was started in,
    whatever `auto` would choose now."""
    return config.machine.precision if stored is None else stored.toolchain["precision"]


def keep_threads(config: TrainConfig, stored: RunConfig | None) -> None:
    """A run that is resumed on a CPU keeps its number of threads: another one adds sums in another order."""
    if stored is not None and config.machine.threads is None:
        torch.set_num_threads(int(stored.toolchain["threads"]))


def require_same_data(folder: Path, stored: RunConfig, found: RunConfig, inputs: Inputs | None) -> None:
    """Raise UsageError, by name, where the data are not those that the run in `folder` was started with.

    inputs: the data's files as they are now. Of runs from before those were recorded only counts and
    statistics are compared.
    """
    known = stored.split.get("inputs_sha256")
    if known is None and found.data.source != stored.data.source:
        raise UsageError(
            f"{folder} was begun by a version that did not record its files, so it cannot be seen whether "
            f"{found.data.source} holds the same; put them back at {stored.data.source}, or start a new run."
        )
    changes = [
        ("its classes", stored.classes, found.classes),
        ("the size of its images", stored.preprocessing, found.preprocessing),
        *(
            (f"its {part} images", counts, found.split["images_per_class"][part])
            for part, counts in stored.split["images_per_class"].items()
        ),
        ("its unreadable images", _names(stored), _names(found)),
        ("the mean or standard deviation of its pixels", (stored.mean, stored.std), (found.mean, found.std)),
    ]
    changed = [f"{name} changed" for name, before, now in changes if before != now]
    if known is not None and known != found.split["inputs_sha256"]:
        listed = folder / FILE
        # by name where the list is there; it says more than the counts
        changed = changed_files(listed, inputs) if listed.is_file() and inputs is not None else changed
        changed = changed or ["its files changed"]
    if changed:
        raise UsageError(
            f"{stored.data_name} is not what this run was started with: {', '.join(changed)}. Give it back "
            "as it was, or start a new run."
        )


def _names(config: RunConfig) -> list[str]:
    """-> the unreadable images, below the data's folder, wherever that is now."""
    start = os.path.join(config.data.folder, "")
    return sorted(name.removeprefix(start) for name in config.split["skipped"])


def gone_on(stored: RunConfig, found: RunConfig) -> RunConfig:
    """-> `stored`, which finds its data where they are now, and has the epochs of now."""
    options = {**stored.options, "data": {**stored.options["data"], "source": found.data.source}}
    options["data"]["root"] = found.data.root
    epochs = found.options["optimisation"]["epochs"]
    options["optimisation"] = {**stored.options["optimisation"], "epochs": epochs}
    return msgspec.structs.replace(stored, data=found.data, options=options)
