"""Gradio's inputs, with its own decoding taken out: the files reach `ffl_deploy.images.decode` as they were sent.

The methods are replaced on the instances: a subclass would make Gradio write a stub file beside this module.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr

MAX_DRAWINGS = 64  # whose pixels wait for their event; Gradio's own store has no bound


def image_input(**options: Any) -> gr.Image:
    """-> an image input whose value is the path of the uploaded file, whatever it holds."""
    image = gr.Image(type="filepath", image_mode=None, **options)

    def preprocess(payload: Any) -> str | None:
        return None if payload is None else payload.path

    image.preprocess = preprocess  # type: ignore[method-assign]
    return image


def drawing_input(**options: Any) -> gr.Sketchpad:
    """-> a drawing pad whose value is the encoded image of what was drawn, as bytes."""
    pad = gr.Sketchpad(type="numpy", layers=False, transforms=(), **options)
    drawings: OrderedDict[str, bytes] = OrderedDict()

    def preprocess(payload: Any) -> bytes | None:
        if payload is None:
            return None
        if payload.id is not None:
            return drawings.pop(payload.id, None)
        return None if payload.composite is None else Path(payload.composite.path).read_bytes()

    def accept_blobs(data: Any) -> None:
        if data.data.get("type") == "composite" and data.files:
            drawings[str(data.data.get("id"))] = data.files[0][1]
            while len(drawings) > MAX_DRAWINGS:
                drawings.popitem(last=False)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]  # Gradio's mark of what its page may call
    pad.preprocess = preprocess  # type: ignore[method-assign,assignment]
    pad.accept_blobs = accept_blobs  # type: ignore[method-assign]
    return pad
