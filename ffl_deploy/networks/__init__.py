"""The model: backbones as lists of stages, the fusion module, and what can be deployed from them.
Needs torch."""
