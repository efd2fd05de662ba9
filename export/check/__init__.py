"""What a written file is judged by: parity, accuracy and latency,
and the layer where a wrong one starts to differ."""
