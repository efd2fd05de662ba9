"""What is told about finished bundles: model card, report, Triton repository, demo Space.
Nothing here imports torch at once."""
