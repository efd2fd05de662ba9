"""The Open Inference Protocol over gRPC, on a port of its own; the models behind it are those of /v2."""
