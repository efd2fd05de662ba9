"""Train, export and serve Feature Fusion Learning models.

from ffl_deploy import load_bundle
bundle = load_bundle("bundles/fused")
bundle.predict(["photo.jpg"])[0].label
"""

from typing import TYPE_CHECKING, Any

from ffl_deploy.version import __version__

if TYPE_CHECKING:
    from ffl_deploy.bundle import Bundle, Prediction, load_bundle
    from ffl_deploy.images import ImageError

__all__ = ["Bundle", "ImageError", "Prediction", "__version__", "load_bundle"]


def __getattr__(name: str) -> Any:
    """Import the bundle's module at first use (PEP 562): --help needs neither NumPy nor Pillow."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("ffl_deploy.images" if name == "ImageError" else "ffl_deploy.bundle"), name)
