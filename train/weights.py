"""Weights from a file, for a branch to start from (--weights).

Read are safetensors and, without executing anything from them, torch's own files: a plain state_dict, one
in a wrapper (`state_dict`, `model`, ...), with NumPy's numbers beside it, or with DataParallel's `module.`
before each name; and this project's own runs, checkpoints and files of `train.branch_weights`. Every tensor
has to find its place and every place its tensor. The head alone may be missing, or be of other classes: it is
then learned anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ffl_deploy.errors import UsageError, first_line
from ffl_deploy.files import did_you_mean, shown
from ffl_deploy.networks.backbones import is_library_name
from ffl_deploy.networks.checkpoint import MODEL, STATE, read_checkpoint
from ffl_deploy.networks.mutual import MutualNetwork
from ffl_deploy.networks.plain_weights import body_prefixes, layout_of
from ffl_deploy.run_directory import CONFIG, load_run

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "state_dict_ema", "model_ema", "net")
"""What training scripts call the state_dict in a file that holds more."""
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
COUNTER = ".num_batches_tracked"  # of batch normalisation; nothing reads it, and old files lack it
OWN = re.compile(r"trunk\.\d+\.\w|branches\.\d+\.\d+\.\w|heads\.\d+\.\w|(trunk_exit|fusion|aggregator)\.\w")


class Loaded(NamedTuple):
    """What became of a file's tensors. loaded: how many have their place; left: a name -> why not."""

    branch: int
    source: Path
    loaded: int
    left: dict[str, str]
    note: str = ""
    names: frozenset[str] = frozenset()  # in the network

    def __str__(self) -> str:
        parts = [f"branch{self.branch} starts from {shown(self.source)}: {self.loaded} tensors"]
        parts += [self.note] if self.note else []
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        parts += [f"not taken: {_some(names)} ({reason})" for reason, names in reasons.items()]
        return "; ".join(parts)


class Source(NamedTuple):
    """One value of --weights. branch: its number; None for every branch."""

    branch: int | None
    path: Path


def sources(values: Sequence[str], branches: Sequence[str]) -> dict[int, Path]:
    """`branch0=FILE` or FILE alone, for all branches -> branch -> file. Raises UsageError."""
    found: dict[int, Path] = {}
    for value in values:
        named = re.match(r"branch(\d+)=", value)
        path = Path(value[named.end() :] if named else value).expanduser()
        numbers = [int(named[1])] if named else list(range(len(branches)))
        for number in numbers:
            if number >= len(branches):
                raise UsageError(
                    f"--weights {value}: there are branches 0 to {len(branches) - 1} ({', '.join(branches)})."
                )
            if number in found:
                raise UsageError(f"--weights names two files for branch{number}; give one.")
            found[number] = path
        if not path.exists():
            raise UsageError(f"--weights: there is no file {shown(path)}.{did_you_mean(shown(path))}")
    return found


def start_from(network: MutualNetwork, values: Sequence[str], flag: str = "--weights") -> list[Loaded]:
    """Give the branches of `network` the weights that `values` of --weights name; -> what was loaded.
    Stages that branches share are those of the first branch. Raises UsageError, and changes nothing then."""
    try:
        return _start_from(network, values)
    except UsageError as error:
        raise UsageError(str(error).replace("--weights", flag)) from error


def _start_from(network: MutualNetwork, values: Sequence[str]) -> list[Loaded]:
    found = sources(values, network.config.branches)
    new: dict[str, Tensor] = {}
    reports: list[Loaded] = []
    for branch, path in sorted(found.items(), reverse=True):
        tensors, loaded = fitted(network, branch, path)
        new |= tensors
        reports.append(loaded)
    network.load_state_dict(network.state_dict() | new)
    return reports[::-1]


def run_of(path: Path) -> Path | None:
    """-> the run that `path` is, or is a checkpoint of, or lies in one; None where there is none."""
    above = [one.parent for one in path.absolute().parents[:2] if one.name == "checkpoints"]
    return next((one for one in (path, *above) if is_run(one)), None)


def is_run(path: Path) -> bool:
    """-> whether it is a run directory, and not another tool's folder that has a config.json."""
    return (path / CONFIG).is_file() and (path / "checkpoints").is_dir()


def fitted(network: MutualNetwork, branch: int, path: Path) -> tuple[dict[str, Tensor], Loaded]:
    """-> (name in the network -> tensor of the file, the report). Raises UsageError."""
    tensors = read_weights(path)
    own = {name: value for name, value in tensors.items() if OWN.match(name)}
    if own and len(own) == len(tensors):
        return _from_own(network, branch, path, own)
    name = network.config.branches[branch]
    if not is_library_name(name) and not name.startswith("resnet"):
        raise UsageError(
            f"--weights {shown(path)}: {name} is this project's own network, which only weights of its own "
            "runs fit."
        )
    layout, note = layout_of(network, branch), ""
    wanted = {key: value for key, value in layout.own.items() if not key.endswith(COUNTER)}
    given = {key: value for key, value in tensors.items() if not key.endswith(COUNTER)}
    if not wanted.keys() & given.keys():
        given = in_order(wanted, [*layout.classifier], given, network, name, path)
        note = "its names are another library's, so they are taken in order, in which every shape fits"
    head = {key: value for key, value in given.items() if key not in wanted}
    body = {key: value for key, value in given.items() if key in wanted}
    left = {key: "unexpected" for key in head if key not in layout.classifier}
    require_fit(wanted, body, left, network, name, path)
    new = {wanted[key]: value for key, value in body.items()}
    new |= {
        layout.own[key]: value
        for key, value in tensors.items()
        if key in layout.own and key.endswith(COUNTER)
    }
    taken, left = _head(network, branch, head, layout.classifier)
    return new | taken, Loaded(branch, path, len(new) + len(taken), left, note, frozenset(new | taken))


def _head(
    network: MutualNetwork, branch: int, head: Mapping[str, Tensor], classifier: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """-> (the head's tensors by the network's names, where it is this very head; else why it is not)."""
    own = network.heads[branch].state_dict()
    fits = {key.rpartition(".")[2]: value for key, value in head.items()}
    if len(head) == len(classifier) == 2 and {key: v.shape for key, v in fits.items()} == {
        key: value.shape for key, value in own.items()
    }:
        return {f"heads.{branch}.{key}": value for key, value in fits.items()}, {}
    classes = next((len(value) for value in fits.values()), 0)
    why = (
        f"the head of {classes:,} classes; {network.config.classes:,} are learned anew"
        if len(head) == 2
        else "a head that is more than pooling and one linear layer"
    )
    return {}, dict.fromkeys(head, why)


def in_order(
    wanted: Mapping[str, str],
    classifier: Sequence[str],
    given: Mapping[str, Tensor],
    network: MutualNetwork,
    name: str,
    path: Path,
) -> dict[str, Tensor]:
    """-> the tensors of a file that calls nothing as `name`'s library does, under that library's names, where
    both hold the same kinds and shapes in the same order. Raises UsageError."""
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    targets, found = [*wanted], [*given.items()]
    # as far as both go: the first that does not fit says more than how many there are
    for place, (target, (key, value)) in enumerate(zip(targets, found, strict=False)):
        if target.rpartition(".")[2] != key.rpartition(".")[2] or shapes[wanted[target]] != value.shape:
            raise UsageError(
                f"--weights {shown(path)} belongs to another architecture than {name}: no tensor is called "
                f"as there, and in order number {place + 1}, {key} {tuple(value.shape)}, does not fit "
                f"{target} {tuple(shapes[wanted[target]])}."
            )
    rest = found[len(targets) :]
    if len(found) < len(targets) or len(rest) not in (0, len(classifier)):
        raise UsageError(
            f"--weights {shown(path)} belongs to another architecture than {name}: it has {len(found)} "
            f"tensors, {len(targets)} and a head of {len(classifier)} are wanted."
        )
    names = [*targets, *(classifier if rest else ())]
    return {target: value for target, (_, value) in zip(names, found, strict=True)}


def require_fit(
    wanted: Mapping[str, str],
    body: Mapping[str, Tensor],
    extra: Mapping[str, str],
    network: MutualNetwork,
    name: str,
    path: Path,
) -> None:
    """Raise UsageError that names the first tensors which have no place, or are missing."""
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    wrong = [f"{key} is missing" for key in wanted if key not in body]
    wrong += [f"{key} has no place there" for key in extra]
    wrong += [
        f"{key} is {tuple(value.shape)} instead of {tuple(shapes[wanted[key]])}"
        for key, value in body.items()
        if shapes[wanted[key]] != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        what = "belongs to another architecture than" if len(wrong) > len(wanted) // 4 else "does not fit"
        raise UsageError(f"--weights {shown(path)} {what} {name}: {', '.join(wrong[:2])}{more}.")


def _from_own(
    network: MutualNetwork, branch: int, path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Loaded]:
    """The body and the head of a branch of one of this project's networks: that of the same number, else the
    first that fits."""
    trunk = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("trunk.")), default=-1)
    count = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("branches.")), default=-1)
    prefixes, shapes = body_prefixes(network, branch), network.state_dict()
    wrong: list[UsageError] = []
    for other in sorted(range(count), key=lambda other: other != branch):
        body: dict[str, Tensor] = {}
        for key, value in tensors.items():
            if key.startswith("trunk."):
                body[key.removeprefix("trunk.")] = value
            elif key.startswith(f"branches.{other}."):
                stage, _, name = key.removeprefix(f"branches.{other}.").partition(".")
                body[f"{trunk + int(stage)}.{name}"] = value
        wanted = {
            f"{stage}.{name.removeprefix(prefix)}": name
            for stage, prefix in enumerate(prefixes)
            for name in shapes
            if name.startswith(prefix)
        }
        fitting = {key: value for key, value in body.items() if key in wanted}
        extra = {key: "" for key in body if key not in wanted}
        try:
            require_fit(wanted, fitting, extra, network, network.config.branches[branch], path)
        except UsageError as error:
            wrong.append(error)
            continue
        head = {key: value for key, value in tensors.items() if key.startswith(f"heads.{other}.")}
        own_head = {key: shapes[f"heads.{branch}.{key.rpartition('.')[2]}"].shape for key in head}
        taken, left = _head(network, branch, head, own_head)
        new = {wanted[key]: value for key, value in fitting.items()}
        note, names = f"branch{other} of that run", frozenset(new | taken)
        return new | taken, Loaded(branch, path, len(names), left, note, names)
    if not wrong:
        raise UsageError(
            f"--weights {shown(path)} holds no branch of a network; give a run of ffl-train, or its "
            "checkpoint."
        )
    raise wrong[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """-> the tensors of a file or run, by its own names. Raises UsageError for what is none, and for a file
    that wants code executed."""
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        try:
            content: Any = load_safetensors(path.read_bytes())
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"--weights {shown(path)} is no safetensors file, or a damaged one ({error})."
            ) from error
    else:
        content = read_without_code(path)
    tensors = unwrapped(content)
    if not tensors:
        raise UsageError(
            f"--weights {shown(path)} holds no state_dict (names with tensors); save one: "
            "torch.save(model.state_dict(), FILE)."
        )
    while prefix := next((one for one in PREFIXES if all(key.startswith(one) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def read_folder(path: Path) -> dict[str, Tensor]:
    """-> the tensors of a run, of a checkpoint, or of what a library keeps of one model (Hugging Face's
    snapshots)."""
    if is_run(path):
        path = load_run(path).checkpoint("best")
    if (path / STATE).is_file():
        return read_checkpoint(path, (MODEL,)).tensors[MODEL]
    if (path / f"{MODEL}.safetensors").is_file():
        return read_weights(path / f"{MODEL}.safetensors")
    raise UsageError(
        f"--weights {shown(path)} is a folder, and neither a run nor a checkpoint of ffl-train; give the "
        "file of weights in it."
    )


def read_without_code(path: Path) -> Any:
    """-> what a file of torch's holds. Raises UsageError where reading it would execute code from it."""
    try:
        with torch.serialization.safe_globals(plain_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any other kind fails in a way of its own
        reason = str(error)
        asked = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", reason)
        if "weights_only" in reason.lower() or "Unsupported" in reason:
            what = f" ({next(filter(None, asked.groups()))})" if asked else ""
            raise UsageError(
                f"--weights {shown(path)} asks for code to be executed when it is opened{what}, which is not "
                "done; save its state_dict alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise UsageError(
            f"--weights {shown(path)} is no file of weights, or a damaged one ({first_line(error)})."
        ) from error


def plain_numbers() -> list[Any]:
    """-> what torch has to know to read NumPy's plain numbers (an accuracy beside the weights): data, no
    code."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [np.float64, np.float32, np.int64, np.int32, np.bool_]
    return [scalar, np.dtype, *kinds, *{type(np.dtype(kind)) for kind in kinds}]


def unwrapped(content: Any) -> dict[str, Tensor]:
    """-> the named tensors in `content`: of the first wrapper that holds some; numbers beside them stay."""
    if not isinstance(content, Mapping):
        return {}
    for wrapper in WRAPPERS:
        if isinstance(inner := content.get(wrapper), Mapping) and (found := unwrapped(inner)):
            return found
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
