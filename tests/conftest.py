"""Fixtures that several packages' tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ffl_deploy.bundle import Bundle


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    """`make_bundle(folder, size=32, classes=(...), ...)` of tests/bundle_factory.py; onnx is imported only where it is used."""
    spec = importlib.util.spec_from_file_location("bundle_factory", Path(__file__).with_name("bundle_factory.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_bundle


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A 32 x 32 bundle with the classes cat, dog, frog. Shared: a test that changes files makes its own."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
