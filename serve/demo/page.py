"""The page: Gradio Blocks over the service's models. Importing this imports Gradio, which takes seconds."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from starlette.routing import Mount

from serve.demo import in_gradio_thread, reports
from serve.demo.batch_tab import batch_tab
from serve.demo.classify_tab import ask_endpoint, classify_tab, draw_tab
from serve.demo.guard import upload_folder
from serve.demo.samples import drawing_style, write_examples
from serve.demo.sessions import bound_states, swept
from serve.server.service import Service

FONT = ["system-ui", "sans-serif"]
# Small images stay crisp; the columns of models stack on a phone; focus is always visible.
CSS = """
html, body {overflow-x: clip;}
.gradio-container {width: 100% !important; max-width: 1100px !important; margin: 0 auto !important;}
.pixelated img {image-rendering: pixelated; width: 100% !important; height: 100% !important;
  object-fit: contain;}
.pixelated .gallery-item img {object-fit: cover;}
.status {min-height: 1.5em; margin: 0;}
.status progress {width: 100%; height: 0.75rem; accent-color: var(--color-accent);}
.problem {border-left: 4px solid var(--error-border-color, #dc2626); padding-left: 0.75rem;}
.quiet {opacity: 0.8; font-size: 0.9em;}
:focus-visible {outline: 3px solid var(--color-accent); outline-offset: 2px;}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important;}
  .gradio-container h1 {font-size: 1.4rem;}
}
"""


def build(service: Service) -> gr.Blocks:
    """-> the page for all models of `service`, which have to be loaded."""
    models = list(service.models.values())
    examples = write_examples(models[0].bundle, upload_folder() / "examples")
    style = drawing_style(models[0].bundle)
    with gr.Blocks(title="ffl-deploy", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_heading(service))
        if style:
            with gr.Tab("Draw", id="draw"):
                draw_tab(service, style)
        with gr.Tab("Classify", id="classify"):
            classify_tab(service, examples)
        with gr.Tab("Batch", id="batch"):
            batch_tab(service)
        with gr.Tab("Which model", id="which"):
            _which_model_tab(service)
        with gr.Tab("Model card", id="card"):
            for model in models:
                with gr.Accordion(model.name, open=model is models[0]):
                    gr.Markdown(reports.card(model.bundle))
        ask_endpoint(service)
    limits = service.settings.limits
    page.queue(max_size=limits.demo_queue, default_concurrency_limit=4)
    bound_states(page, limits.demo_sessions)
    return page


def _heading(service: Service) -> str:
    models = list(service.models.values())
    classes = models[0].bundle.classes
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    names = " and ".join(model.name for model in models) if len(models) < 4 else f"{len(models)} models"
    return (
        f"<h1>{html.escape(names)}: one of {len(classes)} classes</h1>"
        f"<p>{html.escape(shown)}. Every model answers each image; nothing leaves this server.</p>"
    )


def _which_model_tab(service: Service) -> None:
    models = list(service.models.values())
    gr.Markdown(
        "Measured at export, on the machine that exported. Served here: "
        + ", ".join(f"**{model.name}** ({model.variant.name} on {model.session.runtime})" for model in models)
        + "."
    )
    found = reports.reports(models)
    for report in found:
        gr.HTML(
            f"<p><strong>What to ship:</strong> {html.escape(report.advice)}</p>", elem_classes=["advice"]
        )
        if report.picture and (picture := _copied(report.picture)):
            gr.Image(
                picture,
                label="Accuracy against latency and size (Pareto)",
                alt_text="Accuracy against latency and size of every target and variant",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="pareto",
            )
        gr.Dataframe(
            report.rows,
            headers=list(reports.REPORT_COLUMNS),
            interactive=False,
            wrap=True,
            label=f"Export report of {report.folder.name}"
            + (f", measured with {report.machine}" if report.machine else ""),
        )
    covered = {report.folder for report in found}
    if rest := [model for model in models if model.bundle.folder.parent not in covered]:
        label = "Models and variants"
        gr.Dataframe(
            reports.table(rest), headers=list(reports.COLUMNS), interactive=False, wrap=True, label=label
        )
        gr.Markdown("There is no export report beside these bundles; `ffl-export --target all` writes one.")


def _copied(picture: Path) -> str:
    """-> the copy, "" where it is no picture. Gradio hands out files of its own folder only."""
    folder = upload_folder() / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{len(os.listdir(folder))}-{picture.name}"
    return str(copy) if reports.write_picture(picture, copy) else ""


@contextlib.asynccontextmanager
async def mounted(service: Service) -> AsyncIterator[FastAPI]:
    """The page as an application, its queue running; at the end its open streams are closed.

    Settings: docs/serving.md. `show_error` is off so that a fault of ours shows no internals;
    our own messages still show.
    """
    page = await in_gradio_thread(build, service)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        root_path=service.settings.root_path or None,
        allowed_paths=[],
        show_error=False,
        max_file_size=service.settings.limits.upload_bytes,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=["api"],
        theme=gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    (page_app,) = [
        route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, App)
    ]
    service.endless.append(page_app.stop_event.set)  # every open page holds a heartbeat stream
    async with app.router.lifespan_context(app), swept(page, upload_folder()):
        yield app
