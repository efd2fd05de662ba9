"""Train, export and serve Feature Fusion Learning models.

from ffl_deploy import load_bundle
bundle = load_bundle("bundles/fused")
bundle.predict(["photo.jpg"])[0].label
"""

from ffl_deploy.bundle import Bundle, Prediction, load_bundle

__all__ = ["Bundle", "Prediction", "load_bundle"]
__version__ = "0.1.0"
