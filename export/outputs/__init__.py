"""What a graph can give beside logits and probabilities."""

from export.outputs.table import FAMILIARITY, FURTHER_OUTPUTS, ForwardPass, FurtherOutput, TrainingPass

__all__ = ["FAMILIARITY", "FURTHER_OUTPUTS", "ForwardPass", "FurtherOutput", "TrainingPass"]
