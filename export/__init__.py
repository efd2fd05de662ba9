"""A trained run -> bundles: ONNX files, quantised and half-precision variants, engines,
and the gates they must pass."""
