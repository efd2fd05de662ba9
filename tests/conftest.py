"""Fixtures that several packages' tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ffl_deploy.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache is left alone, and remembers nothing of earlier runs;
    processes that a test starts inherit the place."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    """`make_bundle(folder, size=32, classes=(...), ...)` of tests/bundle_factory.py;
    onnx is imported only where it is used."""
    spec = importlib.util.spec_from_file_location(
        "bundle_factory", Path(__file__).with_name("bundle_factory.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_bundle


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A 32 x 32 bundle with the classes cat, dog, frog. Shared: a test that changes files makes its own."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`image_folder(classes=("cat", "dog"), suffix=".png", size=(20, 16), val=2, ...)` ->
    DIR/PART/CLASS/N.png, random images.

    The number of images per class and part is a keyword (train=10, test=4 if not given);
    every image is another one.
    """
    import numpy as np
    from PIL import Image

    def make(
        classes: Sequence[str] = ("cat", "dog"),
        suffix: str = ".png",
        size: tuple[int, int] = (20, 16),
        **counts: int,
    ) -> Path:
        folder, draws = tmp_path / "images", np.random.default_rng(0)
        for part, count in ({"train": 10, "test": 4} | counts).items():
            for name in classes:
                (folder / part / name).mkdir(parents=True)
                for number in range(count):
                    pixels = draws.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / part / name / f"{number:03d}{suffix}")
        return folder

    return make


@pytest.fixture(scope="session")
def signing_keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """name -> the files of a new private and public key in PEM."""
    pytest.importorskip("model_signing", reason="model-signing is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        folder = tmp_path_factory.mktemp(name)
        private, public = folder / f"{name}.pem", folder / f"{name}.pub"
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public.write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        return private, public

    return make
