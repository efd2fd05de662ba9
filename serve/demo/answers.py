"""One image -> every served model's answer, as plain values;
the page and the API endpoint both show these."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ffl_deploy.images import Decoded, ImageError, prepare
from ffl_deploy.preprocessing import Pixels
from serve.server.batcher import Closed, Overloaded
from serve.server.models import NonFinite, ServedModel, timed_infer
from serve.server.service import Service

TOP_K = 5


class Unanswerable(Exception):
    """There is no answer; the text says why, for the person in front of the page."""


@dataclass(frozen=True)
class Answer:
    """What one model took the image for. `top`: (label, probability), falling. `cam`: float32 [h, w],
    where the bundle has it."""

    served: ServedModel
    top: list[tuple[str, float]]
    milliseconds: float  # in the queue and the model
    cam: np.ndarray | None
    promised: dict[str, Any]  # what `Decisions.each` says of it

    @property
    def model(self) -> str:
        return self.served.name

    def as_json(self) -> dict[str, Any]:
        label, confidence = self.top[0]
        return {
            "label": label,
            "confidence": confidence,
            "top": [{"label": name, "confidence": value} for name, value in self.top],
            "milliseconds": round(self.milliseconds, 3),
            **self.promised,
        }


async def decode_upload(service: Service, data: bytes) -> Decoded:
    """-> the decoded image. Raises Unanswerable with a sentence for people."""
    try:
        return await service.decoders.decode(data)
    except ImageError as error:
        raise Unanswerable(f"This file cannot be classified: {error}. Choose another image.") from error
    except Overloaded as error:
        raise Unanswerable("The server is busy; try again in a moment.") from error


async def ask_all(service: Service, pixels: Pixels) -> list[Answer]:
    """-> every model's answer to uint8 RGB [h, w, 3] of any size. One after the other,
    so that no latency includes another's."""
    answers = [
        await ask(model, await asyncio.to_thread(prepare, pixels, model.bundle.preprocessing))
        for model in service.models.values()
    ]
    if not answers:
        raise Unanswerable("No model is loaded at the moment.")
    return answers


async def ask(model: ServedModel, pixels: Pixels) -> Answer:
    """-> one model's answer to an image of its size. Raises Unanswerable."""
    try:
        outputs, seconds = await timed_infer(model, pixels[None])
    except NonFinite as error:
        raise Unanswerable(f"{error}: there is no answer for this image.") from error
    except (Overloaded, Closed) as error:
        raise Unanswerable("The server is busy; try again in a moment.") from error
    top = model.bundle.prediction(outputs.logits[0], outputs.probabilities[0], TOP_K).top
    cam = None if outputs.cam is None else outputs.cam[0]
    return Answer(model, top, seconds * 1000, cam, model.decisions.each(outputs, model.bundle.classes)[0])


def overlay(pixels: Pixels, cam: np.ndarray, size: int = 320) -> Image.Image:
    """-> the class activation map (Zhou et al. 2016) over what the network saw:
    evidence for the answer in warm colours.

    pixels: uint8 [height, width, 3]; cam: float32 [h, w], smaller. Only positive evidence is shown,
    scaled to its maximum.
    """
    height, width = pixels.shape[:2]
    shown = (size * width // max(height, width), size * height // max(height, width))
    evidence = np.maximum(cam, 0)
    scaled = evidence / evidence.max() if evidence.max() > 0 else evidence
    heat = Image.fromarray((scaled * 255).astype(np.uint8)).resize(shown, Image.Resampling.BICUBIC)
    strength = np.asarray(heat, dtype=np.float32)[..., None] / 255
    # few pixels are shown as such: they are what the network saw; of a photograph they would only be edges
    seen = Image.Resampling.NEAREST if 4 * max(height, width) <= size else Image.Resampling.BICUBIC
    gray = np.asarray(
        Image.fromarray(pixels).convert("L").convert("RGB").resize(shown, seen), dtype=np.float32
    )
    # From dark violet over orange to yellow: ordered by lightness,
    # so that it reads without colour vision too.
    stops = np.array([[68, 1, 84], [225, 90, 50], [253, 231, 37]], np.float32)
    colours = np.stack(
        [np.interp(strength[..., 0], [0, 0.5, 1], stops[:, channel]) for channel in range(3)], axis=-1
    )
    return Image.fromarray((gray * (1 - 0.75 * strength) + colours * 0.75 * strength).astype(np.uint8))
