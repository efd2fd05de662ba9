"""Model files: ONNX, quantized, half precision, TensorRT engines. Nothing here judges what it wrote."""
