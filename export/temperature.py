"""Temperature scaling (Guo et al. 2017): one number, fitted on the validation split, that calibrates the
probabilities and changes no prediction."""

from __future__ import annotations

import numpy as np

from export.check.evaluation import Evaluation
from ffl_deploy.manifest import Temperature
from ffl_deploy.statistics import expected_calibration_error, fit_temperature, log_softmax


def calibrate(evaluation: Evaluation, target: str) -> Temperature:
    """-> the temperature of `target`. Training used the validation split for nothing but choosing the
    epoch."""
    validation, test = evaluation.data.validation, evaluation.data.test
    if evaluation.reference_only:
        probabilities = np.exp(log_softmax(evaluation.test_logits[target]))
        ece = expected_calibration_error(probabilities, test.labels)
        note = "exported by the images that training stored alone, so no temperature was fitted"
        return Temperature(note=note, ece_before=ece, ece_after=ece)
    temperature = fit_temperature(evaluation.validation_logits[target], validation.labels)
    notes = [evaluation.run.config.split.get("note", "")]
    if temperature is None:
        notes.append(
            "no temperature can be fitted where the validation split is classified without error, so it is 1"
        )
        temperature = 1.0
    logits = evaluation.test_logits[target]
    return Temperature(
        temperature=temperature,
        split="validation",
        note="; ".join(filter(None, notes)),
        fitted_on=len(validation.labels),
        ece_before=expected_calibration_error(np.exp(log_softmax(logits)), test.labels),
        ece_after=expected_calibration_error(np.exp(log_softmax(logits / temperature)), test.labels),
    )
