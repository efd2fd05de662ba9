"""What was typed -> TrainConfig. The flags and their help are derived from the dataclasses of config.py.

A flag has no default of its own, so that the namespace holds what was typed and nothing else. That is laid
over the stored options of --resume, or else over the recipe that --recipe, --data and --method choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from inspect import getdoc
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from ffl_deploy.command import Parser
from ffl_deploy.data import NAMED
from ffl_deploy.errors import UsageError, choices_sentence
from ffl_deploy.preprocessing import ImageSize
from ffl_deploy.run_directory import SUMMARY, load_run
from train.config import Help, TrainConfig, split_names
from train.options import data_spec, differences, options_from_json, require_kept, validate
from train.recipes import fine_tuning, recipe_for

T = TypeVar("T")
Typed = dict[str, Any]
"""Option, as in "seed" or "optimisation.lr" -> the value that its flag was given;
nothing for flags that were not typed."""


class Flags(Parser):
    """A flag for each option of dataclasses. options: their values are what --help calls the defaults.

    others: further options that may be typed, where `options` has no flag of the name;
    --help is silent about them.
    """

    def __init__(self, prog: str, options: Any, others: Any = None, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=prog, description=getdoc(type(options)), usage="%(prog)s [-h] [OPTIONS]", examples=examples,
            add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        self.spellings: list[str] = []
        self.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
        self.add_options(options, self)
        if others is not None:
            self.add_options(others, None)

    def add_options(self, options: Any, shown: argparse._ActionsContainer | None, prefix: str = "") -> None:
        """A flag for each field of `options`; a field that
        is a dataclass itself becomes a group of --help."""
        kinds = get_type_hints(type(options))
        for field in fields(options):
            value = getattr(options, field.name)
            if is_dataclass(value):
                group = (
                    self.add_argument_group(f"{field.name} options", getdoc(type(value))) if shown else None
                )
                self.add_options(value, group, f"{field.name}.")
                continue
            kind, about = kinds[field.name], field.metadata["help"]
            flag = f"--{about.flag or field.name.replace('_', '-')}"
            if flag in self.spellings:
                continue
            settings = value_of(kind, about)
            added = (shown or self).add_argument(
                flag,
                dest=prefix + field.name,
                help=help_text(about, value) if shown else argparse.SUPPRESS,
                **settings,
            )
            self.spellings += added.option_strings

    def typed(self, argv: Sequence[str]) -> Typed:
        """Raises UsageError for flags that do not exist and values that do not fit."""
        try:
            found, unknown = self.parse_known_args(argv)
        except argparse.ArgumentError as error:
            self.error(f"{error.argument_name}: {error.message.rstrip('.')}")
        if unknown:
            folder = next((word for word in unknown if Path(word).is_dir()), None)
            hint = f". Did you mean --data {folder}?" if folder and "--data" in self.spellings else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return {
            name: tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()
        }

    def show_help(self) -> NoReturn:
        """Print the help and end the command."""
        self.print_help()
        self.exit()


def value_of(kind: Any, about: Help) -> dict[str, Any]:
    """-> what argparse needs to know of an option of type `kind`: bool, a Literal, tuple, int, float, str,
    Path; or None."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind == tuple[str, ...]:
        return {"type": split_names, "metavar": "A,B,..."}
    if kind == ImageSize | None:
        return {"type": read_size, "metavar": about.metavar}
    if get_origin(kind) is tuple:
        return {"type": reader(get_args(kind)[0]), "nargs": "*", "metavar": about.metavar}
    choices = about.choices or (get_args(kind) if get_origin(kind) is Literal else ())
    if choices:
        return {"type": one_of(choices), "metavar": "{" + ",".join(choices) + "}"}
    plain = next((one for one in get_args(kind) if one is not NoneType), kind)
    return {
        "type": reader(plain, optional=plain is not kind),
        "metavar": about.metavar or plain.__name__.upper(),
    }


def reader(kind: type, optional: bool = False) -> Callable[[str], Any]:
    """-> what reads a value of `kind`; the word None too where there may be none."""

    def read(text: str) -> Any:
        if optional and text == "None":
            return None
        try:
            return kind(text)
        except ValueError:
            what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return read


def read_size(text: str) -> ImageSize | None:
    """ "96" -> 96, "96x64" -> (96, 64): width and height. Raises ArgumentTypeError."""
    if text == "None":
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT, as in 96x64"
        )
    return int(text) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """-> what lets one of `choices` through."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"there is no {text!r}. {choices_sentence(text, list(choices))}")
        return text

    return read


def help_text(about: Help, value: Any) -> str:
    """-> the option's line of --help; what is absent by default says so itself."""
    shown = ",".join(value) if value and isinstance(value, tuple) and isinstance(value[0], str) else value
    shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
    shown = f"{shown:.3g}" if isinstance(shown, float) else shown
    return (about.text if value is None else f"{about.text} (default: {shown})").replace("%", "%%")


def override(options: T, typed: Mapping[str, Any]) -> T:
    """-> `options` with what was typed in its place."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in typed.items():
        group, _, field = name.rpartition(".")
        groups.setdefault(group, {})[field] = value
    own = groups.pop("", {})
    own |= {group: replace(getattr(options, group), **values) for group, values in groups.items()}
    return replace(options, **own)  # type: ignore[type-var]


def stored_options(typed: Typed) -> TrainConfig | None:
    """-> the options of the run that --resume names. Raises UsageError, CheckError."""
    resumed: Path | None = typed.get("output.resume")
    if resumed is None:
        return None
    stored = load_run(resumed).config
    config = options_from_json(stored.options)
    # the data's folder as an absolute path: a run goes on from anywhere
    root = None if stored.data.root is None else Path(stored.data.root)
    return replace(config, data=replace(config.data, source=stored.data.source, root=root))


def fine_tuned_options(typed: Typed) -> TrainConfig | None:
    """-> what fine-tuning the run that --quantize-aware names starts from.
    Raises UsageError where it is not finished."""
    trained: Path | None = typed.get("model.quantize_aware")
    if trained is None:
        return None
    run = load_run(trained)
    if not (run.folder / SUMMARY).is_file():
        raise UsageError(
            f"{trained} is not finished, so there is nothing to fine-tune yet; go on with: ffl-train "
            f"--resume {trained}"
        )
    return fine_tuning(options_from_json(run.config.options), trained)


def starting_point(typed: Typed) -> TrainConfig:
    """-> the options that flags are laid over: of a run, or of a recipe. Raises UsageError, CheckError."""
    return stored_options(typed) or fine_tuned_options(typed) or recipe_for(typed)


def _same_places(typed: Typed, stored: TrainConfig) -> Typed:
    """-> `typed` with the data's folder or list, however it was spelled, as the resumed run spells it."""
    source, same = typed.get("data.source"), dict(typed)
    if source is not None and source != stored.data.source and Path(source).expanduser().exists():
        absolute = Path(source).expanduser().absolute()
        known = Path(stored.data.source)
        if known.exists() and absolute.samefile(known):
            return same | {"data.source": stored.data.source}
        same["data.source"] = str(absolute)
        if stored.data.source not in NAMED:
            moved = data_spec(stored).moved(str(absolute))
            same["data.source"] = moved.source
            if moved.root is not None:
                same.setdefault("data.root", Path(moved.root))
    return same


def _from_anywhere(teacher: str) -> str:
    """-> what --teacher was given with its path absolute, since a run goes on from any folder; what is no
    path of anything as it is."""
    if teacher == "ema":
        return teacher
    name, equals, file = teacher.rpartition("=")
    for prefix, path in (("", Path(teacher).expanduser()), (name + equals, Path(file).expanduser())):
        if path.exists():
            return f"{prefix}{path.absolute()}"
    return teacher


def configure(typed: Typed) -> TrainConfig:
    """-> the recipe's configuration, overridden by flags; with --resume the run's own, which flags may only
    repeat; with --quantize-aware that run's own, whose networks and images stay.

    Raises UsageError.
    """
    if teacher := typed.get("model.teacher"):
        typed = {**typed, "model.teacher": _from_anywhere(teacher)}
    stored = stored_options(typed)
    if stored is not None:
        typed = _same_places(typed, stored)
    started_from = stored or starting_point(typed)
    config = override(started_from, typed)
    if config.model.quantize_aware is not None and stored is None:
        require_kept(started_from, config)
    if stored is not None:
        resumed = typed["output.resume"]
        changed = differences(stored, config, resumed=True)
        changed += [
            f"--{name.split('.')[-1]} is {str(typed[name])!r} now and was {str(before)!r}"
            for name, before in (("recipe", stored.recipe), ("output.out", resumed))
            if name in typed and typed[name] != before
        ]
        if changed:
            raise UsageError(
                f"--resume continues {resumed} as it was started, but {'; '.join(changed)}: "
                "leave these flags out, or start a new run with --out."
            )
    validate(config)
    return config
