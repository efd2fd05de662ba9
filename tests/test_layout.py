"""How the files of a package stand to each other: no circle between files, few floors of rooms.

A *room* is a direct child of a package: a file, or a folder with all that is in it. Its *floor* is 1 where it
imports no other room of the package, else one more than the highest of those that it imports. Imports inside
functions count, as do those for type checkers: a reader follows them too. `__main__` files are doors: they
may import from any floor.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Mapping, Set
from pathlib import Path

import grimp
import pytest

# package -> the most floors it may have, or None where that is not asked of it (yet)
PACKAGES: dict[str, int | None] = {"ffl_deploy": None, "export": 7, "serve": 5, "train": None}


def imports_of(package: str) -> dict[str, set[str]]:
    """-> file (as a dotted name) -> the files of the same package that it imports."""
    graph = grimp.build_graph(package, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: Mapping[str, Set[str]]) -> list[str]:
    """-> the names of one circle, its first name again at the end; [] where there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def rooms_of(package: str, imports: Mapping[str, Set[str]]) -> dict[str, set[str]]:
    """-> room -> the rooms that it imports."""

    def room(module: str) -> str:
        return module.removeprefix(package + ".").partition(".")[0]

    rooms: dict[str, set[str]] = {room(module): set() for module in imports if module != package}
    for module, imported in imports.items():
        if module != package and not module.endswith(".__main__"):
            rooms[room(module)] |= {room(other) for other in imported if other != package} - {room(module)}
    return rooms


def floors_of(rooms: Mapping[str, Set[str]]) -> dict[str, int]:
    """-> room -> its floor. Raises graphlib.CycleError."""
    floors: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[other] for other in rooms[room]), default=0)
    return floors


def test_every_file_is_on_the_map() -> None:
    """docs/architecture.md names it in the section of its package; a new file gets a word or two there."""
    root = Path(__file__).parents[1]
    house = (
        (root / "docs" / "architecture.md").read_text().split("## The house")[1].split("Rules, checked")[0]
    )
    sections = dict(re.findall(r"^    (\w+)/ (.*?)(?=^    \w|\Z)", house, re.S | re.M))
    missing = [
        str(path.relative_to(root))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        if not path.stem.startswith("__") and not re.search(rf"\b{path.stem}\b", sections[package])
    ]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_files(package: str) -> None:
    imports = imports_of(package)
    assert len(imports) > 10  # the package was found
    assert circle(imports) == []


@pytest.mark.parametrize("package", [package for package, floors in PACKAGES.items() if floors])
def test_rooms_stand_on_few_floors(package: str) -> None:
    rooms = rooms_of(package, imports_of(package))
    assert circle(rooms) == []
    floors = floors_of(rooms)
    assert max(floors.values()) <= PACKAGES[package], floors


def test_a_circle_inside_a_function_is_found_and_floors_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = tmp_path / "house_of_this_test"
    (house / "cellar").mkdir(parents=True)
    for folder in (house, house / "cellar"):
        (folder / "__init__.py").write_text("")
    name = house.name
    (house / "top.py").write_text(f"from {name} import middle")
    (house / "middle.py").write_text(f"def late():\n    from {name}.cellar import wine")
    (house / "cellar" / "wine.py").write_text("")
    (house / "cellar" / "__main__.py").write_text(f"import {name}.top")  # a door
    monkeypatch.syspath_prepend(tmp_path)

    rooms = rooms_of(name, imports_of(name))
    assert floors_of(rooms) == {"cellar": 1, "middle": 2, "top": 3}
    (house / "cellar" / "wine.py").write_text(f"def late():\n    from {name}.top import middle")
    assert set(circle(imports_of(name))) == {f"{name}.top", f"{name}.middle", f"{name}.cellar.wine"}
