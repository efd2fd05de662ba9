"""The batch tab: many files or zips -> progress, a table, the uncertain images, downloads."""

from __future__ import annotations

import asyncio
import html
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ffl_deploy.images import SUFFIXES
from ffl_deploy.preprocessing import Pixels
from serve.demo import sentences
from serve.demo.batch import BatchState, classify_files, write_table
from serve.demo.guard import upload_folder
from serve.inputs.archives import ZIP_SUFFIXES
from serve.rows import OK, Row
from serve.server.batcher import Closed, Overloaded
from serve.server.service import Service

SHOWN_ROWS = 500
THUMBNAIL = 160
HEADERS = ("file", "label", "confidence", "status", "error")
SHOWN_CLASSES = 8


RUNNING = gr.update(interactive=True, variant="stop")  # the button that stops a batch
IDLE = gr.update(interactive=False, variant="secondary")


def batch_tab(service: Service) -> None:
    """Build the tab."""
    # what is seen: files on the left, what became of them on the right
    names = list(service.models)
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280, scale=1):
            files = gr.File(
                label="Images, or zip files of images",
                file_count="multiple",
                file_types=[*SUFFIXES, *ZIP_SUFFIXES],
                type="filepath",
                height=220,
                elem_id="files",
            )
            model = gr.Dropdown(
                names, value=names[0], label="Model", visible=len(names) > 1, elem_id="batch-model"
            )
            with gr.Row():
                start = gr.Button("Classify all", variant="primary", min_width=120, elem_id="start-batch")
                stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="stop-batch")
        with gr.Column(min_width=280, scale=2):
            status = gr.HTML(
                sentences.status("Choose files, then press Classify all."),
                elem_id="batch-status",
                elem_classes=["status"],
            )
            with gr.Row():
                csv = gr.DownloadButton("Download CSV", visible=False, elem_id="csv")
                parquet = gr.DownloadButton("Download Parquet", visible=False, elem_id="parquet")
            table = gr.HTML(elem_id="rows")
            gallery = gr.Gallery(
                label="Least certain images",
                columns=4,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=[],
                visible=False,
                elem_id="uncertain",
            )

    # what happens: progress and rows after every chunk, pictures and files at the end
    async def run(paths: list[str] | None, name: str) -> AsyncIterator[list[Any]]:
        nothing = [*[gr.skip()] * 4, IDLE]
        if not paths:
            yield [sentences.status("Choose files first."), *nothing]
            return
        model = service.models.get(name)
        if model is None:
            yield [sentences.status(f"{name} is not loaded at the moment."), *nothing]
            return
        none = gr.update(value=None, visible=False)
        yield [_progress(BatchState(), paths), "", none, none, none, RUNNING]
        state = BatchState()
        try:
            async for state in classify_files(service, model, paths):
                yield [_progress(state, paths), _table(state.rows), *[gr.skip()] * 4]
        except (Overloaded, Closed):
            yield [sentences.status("The server is too busy for a batch; try again later."), *nothing]
            return
        if not state.rows:
            yield [sentences.status("These files hold no images."), *nothing]
            return
        written = await asyncio.to_thread(_write, state)
        found = [gr.update(value=value, visible=True) for value in (_gallery(state), *map(str, written))]
        yield [sentences.status(_summary(state)), _table(state.rows), *found, IDLE]

    # what the buttons do
    running = start.click(
        run,
        [files, model],
        [status, table, gallery, csv, parquet, stop],
        api_visibility="private",
        concurrency_limit=1,  # one batch at a time: single images go on beside it
        show_progress="hidden",
        trigger_mode="once",
    )
    stop.click(
        lambda: [sentences.status("Stopped."), IDLE],
        None,
        [status, stop],
        cancels=[running],
        api_visibility="private",
        queue=False,
    )


def _write(state: BatchState) -> list[Path]:
    folder = Path(tempfile.mkdtemp(prefix="batch-", dir=upload_folder()))
    return [write_table(state.rows, folder, format) for format in ("csv", "parquet")]


def _table(rows: list[Row]) -> str:
    """-> the first rows as HTML: what could not be read before everything else, then in order."""
    in_order = sorted(rows, key=lambda row: row.status == OK)
    cells = [
        [
            row.path,
            row.label or "",
            "" if row.confidence is None else f"{row.confidence:.1%}",
            "" if row.status == OK else row.status.replace("_", " "),
            row.error or "",
        ]
        for row in in_order[:SHOWN_ROWS]
    ]
    return sentences.table("Predictions", HEADERS, cells)


def _gallery(state: BatchState) -> list[tuple[Image.Image, str]]:
    return [
        (_thumbnail(entry.pixels), f"{entry.row.label} {entry.row.confidence:.0%}")
        for entry in state.uncertain
    ]


def _thumbnail(pixels: Pixels) -> Image.Image:
    """-> what the network saw, small images enlarged without smoothing."""
    factor = max(1, THUMBNAIL // max(pixels.shape[:2]))
    return Image.fromarray(np.kron(pixels, np.ones((factor, factor, 1), np.uint8)))


def _summary(state: BatchState) -> str:
    done = len(state.rows)
    text = f"{done:,} images: {done - state.errors:,} classified"
    if state.errors:
        codes = sorted({row.status.replace("_", " ") for row in state.rows if row.status != OK})
        text += f", {state.errors:,} could not be read ({', '.join(codes)})"
    classes = Counter(row.label for row in state.rows if row.label).most_common()
    if classes:
        counts = ", ".join(f"{label}: {count:,}" for label, count in classes[:SHOWN_CLASSES])
        text += f"; {counts}{', …' if len(classes) > SHOWN_CLASSES else ''}"
    if state.skipped.reasons:
        text += f"; skipped {state.skipped}"
    if state.limited:
        text += "; the demo stops here, use ffl-predict for more"
    if done > SHOWN_ROWS:
        text += f". The table shows {SHOWN_ROWS}, the downloads hold all"
    return text + "."


def _progress(state: BatchState, paths: list[str]) -> str:
    archives = any(path.lower().endswith(ZIP_SUFFIXES) for path in paths)
    done = len(state.rows)
    text = (
        f"{done:,} images, {state.errors:,} errors"
        if archives
        else f"{done:,} of {len(paths):,} images, {state.errors:,} errors"
    )
    bar = "<progress></progress>" if archives else f'<progress value="{done}" max="{len(paths)}"></progress>'
    return f'<p role="status">{html.escape(text)}</p>{bar}'
