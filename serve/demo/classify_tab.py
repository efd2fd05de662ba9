"""One image, every model side by side: upload, paste, pick an example, or draw.
And the endpoint for `gradio_client`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ffl_deploy.images import MAX_PIXELS, prepare
from ffl_deploy.preprocessing import Pixels
from serve.demo import sentences
from serve.demo.answers import TOP_K, Answer, Unanswerable, ask_all, decode_upload, overlay
from serve.demo.drawing_pad import drawing_of, drawing_pad
from serve.demo.inputs import image_input
from serve.demo.samples import DrawingStyle, frame_drawing
from serve.server.service import Service

CONCURRENT = 8  # actions at a time; their images meet again in the micro-batcher
WAITING = "Waiting for an image."


@dataclass(frozen=True)
class Panel:
    """Where one model's answer appears."""

    model: str
    label: gr.Label
    note: gr.Markdown
    cam: gr.Image | None


@dataclass(frozen=True)
class Panels:
    """The models' panels side by side. Before there is an answer nothing of them is shown: empty frames
    would push the examples off a phone's screen."""

    row: gr.Row
    each: list[Panel]

    @property
    def outputs(self) -> list[Any]:
        """-> the components that an action fills."""
        shown = [(panel.label, panel.note, panel.cam) for panel in self.each]
        return [self.row, *(part for parts in shown for part in parts if part is not None)]

    @property
    def nothing(self) -> list[Any]:
        """-> their values while there is no answer."""
        return [gr.update(visible=False), *[None] * (len(self.outputs) - 1)]


def classify_tab(service: Service, examples: list[Path]) -> None:
    """Upload, paste or pick; answers appear as soon as there is an image."""
    crisp = ["pixelated"] if _small(service) else []  # a digit of 8 x 8 pixels is no use as a smooth blur
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280, scale=1, elem_id="asked"):
            image = image_input(
                label="Image",
                sources=["upload", "clipboard"],
                height=280,
                elem_id="image",
                elem_classes=crisp,
                placeholder=f"Drop an image here, or choose one. Up to {MAX_PIXELS // 1_000_000} megapixels.",
            )
            with gr.Column(elem_classes=crisp, elem_id="examples"):  # on a phone below the answer: page.CSS
                gr.Examples(
                    [[str(path)] for path in examples],
                    inputs=[image],
                    label="Examples: test images of this model",
                )
        with gr.Column(min_width=280, scale=2, elem_id="answers"):
            status = gr.HTML(sentences.status(WAITING), elem_id="status", elem_classes=["status"])
            panels = _panels(service)

    async def show_image(path: str | None) -> list[Any]:
        if path is None:
            return [sentences.status(WAITING), *panels.nothing]
        return await _shown(service, panels, await asyncio.to_thread(Path(path).read_bytes))

    image.change(
        show_image,
        [image],
        [status, *panels.outputs],
        api_visibility="private",
        concurrency_limit=CONCURRENT,
        show_progress="minimal",
        trigger_mode="always_last",
    )


def draw_tab(service: Service, style: DrawingStyle) -> None:
    """A pad; the drawing is framed as the network's own images are, and that frame is shown."""
    # what is seen
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280, scale=1):
            pad = drawing_pad()
        with gr.Column(min_width=280, scale=2):
            status = gr.HTML(
                sentences.status("Waiting for a drawing."), elem_id="drawing-status", elem_classes=["status"]
            )
            seen = gr.Image(
                label="What the network sees",
                height=140,
                interactive=False,
                buttons=[],
                visible=False,
                elem_id="seen",
                elem_classes=["pixelated", "captioned"],
            )
            panels = _panels(service)

    # what happens to a drawing
    async def show_drawing(event: gr.EventData) -> list[Any]:
        drawing, empty = drawing_of(event), [gr.update(visible=False), *panels.nothing]
        if drawing is None:
            return [sentences.status("Draw something first."), *empty]
        try:
            framed = frame_drawing((await decode_upload(service, drawing)).pixels, style)
            if framed is None:
                return [sentences.status("Draw something first."), *empty]
            answers = await ask_all(service, framed)
        except Unanswerable as error:
            return [sentences.problem(str(error)), *empty]
        first = answers[0].served.bundle.preprocessing
        return [
            sentences.status(_verdict(answers)),
            gr.update(value=prepare(framed, first), visible=True),
            *_filled(panels, answers, framed),
        ]

    pad.submit(
        show_drawing,
        None,
        [status, seen, *panels.outputs],
        api_visibility="private",
        concurrency_limit=CONCURRENT,
        show_progress="minimal",
        trigger_mode="always_last",
    )


def ask_endpoint(service: Service) -> None:
    """`client.predict(image=handle_file("photo.jpg"), api_name="/classify")`."""
    image = image_input(label="image", visible=False)
    answers = gr.JSON(label="answers", visible=False)
    button = gr.Button(visible=False)

    async def classify(image: str) -> dict[str, dict[str, Any]]:
        if image is None:
            raise gr.Error("Give an image file.", print_exception=False)
        try:
            decoded = await decode_upload(service, await asyncio.to_thread(Path(image).read_bytes))
            found = await ask_all(service, decoded.pixels)
        except Unanswerable as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {answer.model: answer.as_json() for answer in found}

    button.click(
        classify,
        [image],
        [answers],
        api_name="classify",
        api_description=(
            "Classify one image with every served model. Returns, for each model's name, label, confidence "
            f"(0..1), top ({TOP_K} objects with label and confidence, falling) and milliseconds."
        ),
        concurrency_limit=CONCURRENT,
    )


def _small(service: Service) -> bool:
    return max(max(model.signature.height, model.signature.width) for model in service.models.values()) <= 64


def _panels(service: Service) -> Panels:
    panels = []
    with gr.Row(equal_height=False, visible=False) as row:
        for model in service.models.values():
            with gr.Column(min_width=200):
                label = gr.Label(
                    label=model.name, num_top_classes=TOP_K, elem_classes=[f"answer-{model.name}"]
                )
                note = gr.Markdown(elem_classes=["quiet"])
                cam = None
                if "cam" in model.signature.outputs:
                    cam = gr.Image(
                        label=f"Where {model.name} looked",
                        interactive=False,
                        buttons=["fullscreen"],
                        height=240,
                        elem_classes=[f"cam-{model.name}", "captioned"],
                    )
                panels.append(Panel(model.name, label, note, cam))
    return Panels(row, panels)


async def _shown(service: Service, panels: Panels, data: bytes) -> list[Any]:
    try:
        decoded = await decode_upload(service, data)
        answers = await ask_all(service, decoded.pixels)
    except Unanswerable as error:
        return [sentences.problem(str(error)), *panels.nothing]
    remark = " Only the first frame of this animation was classified." if decoded.animated else ""
    return [sentences.status(_verdict(answers) + remark), *_filled(panels, answers, decoded.pixels)]


def _filled(panels: Panels, answers: list[Answer], pixels: Pixels) -> list[Any]:
    values: list[Any] = [gr.update(visible=True)]
    by_name = {answer.model: answer for answer in answers}
    for panel in panels.each:
        answer = by_name.get(panel.model)
        if answer is None:  # unloaded since the page was built
            values += [None, "not loaded at the moment", *([] if panel.cam is None else [None])]
            continue
        model = answer.served
        values += [
            dict(answer.top),
            f"{answer.milliseconds:.1f} ms · {model.variant.name} on {model.session.runtime}"
            + sentences.promise(answer.promised, model.decisions.sets),
        ]
        if panel.cam is not None:
            shown = prepare(pixels, model.bundle.preprocessing)
            values.append(None if answer.cam is None else overlay(shown, answer.cam))
    return values


def _verdict(answers: list[Answer]) -> str:
    labels = {answer.top[0][0] for answer in answers}
    if len(answers) == 1:
        return f"{answers[0].model} says {answers[0].top[0][0]}."
    if len(labels) == 1:
        return f"{'Both' if len(answers) == 2 else f'All {len(answers)}'} models say {labels.pop()}."
    return (
        "The models disagree: "
        + ", ".join(f"{answer.model} says {answer.top[0][0]}" for answer in answers)
        + "."
    )
