"""Gradio's image input with its own decoding taken out:
the file reaches `ffl_deploy.images.decode` as it was sent."""

from __future__ import annotations

from typing import Any

import gradio as gr


def image_input(**options: Any) -> gr.Image:
    """-> an image input whose value is the path of the uploaded file, whatever it holds.

    The method is replaced on the instance: a subclass would make Gradio write a stub file beside this module.
    """
    image = gr.Image(type="filepath", image_mode=None, **options)

    def preprocess(payload: Any) -> str | None:
        return None if payload is None else payload.path

    image.preprocess = preprocess  # type: ignore[method-assign]
    return image
