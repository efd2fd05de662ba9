"""The documentation speaks of files, names and flags that there are."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")])
PACKAGES = ("ffl_deploy", "train", "export", "serve", "benchmarks", "examples", "tests", "docs")
SOURCES = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
PLACEHOLDER = re.compile(r"[A-Z]{3,}|[*{]")  # export/write/NAME.py, docs/*.md


def spans(page: Path) -> Iterator[str]:
    """Yield every code span and every line of a code block."""
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```|^((?:    .*\n)+)", text, re.S | re.M):
        yield from "".join(block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", text)


def top_level_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def exists(dotted: str) -> bool:
    """-> whether `train.run` or `ffl_deploy.bundle.load_bundle` is a module, or a name in one."""
    place, parts = ROOT, dotted.split(".")
    for depth, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        file = place / f"{part}.py"
        if file.is_file():
            rest = parts[depth + 1 :]
        else:
            file, rest = place / "__init__.py", parts[depth:]
        return file.is_file() and set(rest) <= top_level_names(file)
    return True


PATH = re.compile(rf"(?<![\w/.])((?:{'|'.join(PACKAGES)})/[\w/.*-]+\.(?:py|md|json|toml))\b")
DOTTED = re.compile(rf"(?<![\w/.-])((?:{'|'.join(PACKAGES[:5])})(?:\.(?!py\b|md\b)[a-zA-Z_]\w*)+)")

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
FOREIGN = ("ray start", "curl ", "pip ", "docker ", "git ")  # commands of others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_that_a_page_mentions_are_there(page: Path) -> None:
    text = list(spans(page))
    paths = [path for span in text for path in PATH.findall(span) if not PLACEHOLDER.search(path)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [dotted for span in text for dotted in DOTTED.findall(span) if not exists(dotted)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    named = {span for span in spans(page) if re.fullmatch(r"test_\w+", span)}
    assert {name for name in named if f"def {name}(" not in tests} == set()


def flag_names(options: object) -> Iterator[str]:
    """Yield the flags of ffl-train, which are the fields of its options."""
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from flag_names(value)
        else:
            yield f"--{field.name.replace('_', '-')}"


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Every flag that a source file spells out, and those that are made from fields."""
    spelt = {flag for path in SOURCES for flag in FLAG.findall(path.read_text())}
    return {*spelt, *flag_names(TrainConfig())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_a_page_mentions_are_there(page: Path, known_flags: set[str]) -> None:
    ours = [span for span in spans(page) if not span.strip("` ").startswith(FOREIGN)]
    mentioned = {flag for span in ours for flag in FLAG.findall(re.sub(r"\(.*?\)", "", span))}
    assert mentioned - known_flags == set()


def anchors(page: Path) -> set[str]:
    """-> what a link to a heading of the page may end with, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    generated = {"README.md", "compare-cifar100.md"}
    pages = {path.name for path in ROOT.glob("docs/*.md")} - generated
    assert {name for name in pages if f"({name})" not in index} == set()


def test_a_name_that_is_gone_is_found() -> None:
    assert exists("train.run")
    assert exists("ffl_deploy.bundle.load_bundle")
    assert exists("ffl_deploy.load_bundle")
    assert not exists("train.walk")
    assert not exists("train.loop.no_such_function")
