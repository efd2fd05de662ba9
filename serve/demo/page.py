"""The page: Gradio Blocks over the service's models. Importing this imports Gradio, which takes seconds."""

from __future__ import annotations

import contextlib
import html
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from importlib.resources import files
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from starlette.routing import Mount

from serve.demo import in_gradio_thread, reports, sentences
from serve.demo.api_tab import api_tab
from serve.demo.batch_tab import batch_tab
from serve.demo.classify_tab import ask_endpoint, classify_tab, draw_tab
from serve.demo.guard import upload_folder
from serve.demo.samples import drawing_style, example_names, write_examples
from serve.demo.sessions import bound_states, swept
from serve.demo.texts import Texts
from serve.server.models import ServedModel
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
.scroll {overflow-x: auto; border: 0 !important;}
.prose .scroll table, .scroll table {display: table; overflow: visible;
  border-collapse: collapse; width: 100%; white-space: nowrap; font-size: 0.92em;}
.table {margin: 0;}
.table figcaption {padding: 0.25rem 0;}
.scroll th, .scroll td {text-align: left; padding: 0.3rem 0.7rem;
  border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important;}
.scroll .marked {font-weight: 600; background: var(--background-fill-secondary);}
#rows .scroll {max-height: 340px; overflow: auto;}
#uncertain label[data-testid="block-label"] {position: static; display: inline-flex; border: 0;}
.prose table {display: block; overflow-x: auto; white-space: nowrap; max-width: 100%;}
.prose table, .scroll tr, .scroll thead, .scroll tbody {border: 0 !important;}
#rows td:last-child:nth-child(5) {white-space: normal; min-width: 14rem;}
.prose td, .prose th, .prose td code {word-break: normal; overflow-wrap: normal; white-space: nowrap;}
.prose pre code {white-space: pre-wrap; overflow-wrap: anywhere;}
.prose pre .token {color: inherit !important;}
.captioned label[data-testid="block-label"] {position: static; display: inline-flex; border: 0;}
.dark #pareto img {filter: invert(0.92) hue-rotate(180deg);}
#files .download-link, #files .file button {color: var(--body-text-color) !important;}
/* Gradio's "add more" is a button inside a button, named "common.upload". */
#files .icon-button:has(.upload-container) {display: none;}
#assist {display: none;}
.gradio-container button.primary {background: #9a3412 !important; color: #fff !important;}
#files .or, #image .or {color: var(--body-text-color) !important;}
.problem {border-left: 4px solid var(--error-border-color, #dc2626); padding-left: 0.75rem;}
.quiet {opacity: 0.8; font-size: 0.9em;}
:focus-visible {outline: 3px solid var(--color-accent); outline-offset: 2px;}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important;}
  .gradio-container h1 {font-size: 1.4rem;}
  #asked {display: contents;}
  #asked > * {order: 1; width: 100%;}
  #answers {order: 2;}
  #asked > #examples {order: 3;}
}
"""


def build(service: Service) -> tuple[gr.Blocks, Texts]:
    """-> the page for all models of `service`, which have to be loaded; and what it says of them."""
    models = list(service.models.values())
    examples = write_examples(models[0].bundle, upload_folder() / "examples")
    style = drawing_style(models[0].bundle)
    texts = Texts(lambda: title_of(service))
    with gr.Blocks(title=title_of(service), analytics_enabled=False, fill_width=True) as page:
        texts.of(lambda: _heading(service), gr.HTML)
        gr.HTML(
            html_template='<div data-names="${value}"></div>',
            value=html.escape(json.dumps(example_names(models[0].bundle))),
            js_on_load=Path(__file__).with_name("assist.js").read_text(encoding="utf-8"),
            elem_id="assist",
        )
        with gr.Tabs(overflow_behavior="wrap"):  # on a phone in two rows, not behind a button with dots
            if style:
                with gr.Tab("Draw", id="draw"):
                    draw_tab(service, style)
            with gr.Tab("Classify", id="classify"):
                classify_tab(service, examples)
            with gr.Tab("Batch", id="batch"):
                batch_tab(service)
            with gr.Tab("Which model", id="which"):
                _which_model_tab(service, texts)
            with gr.Tab("Model card", id="card"):
                for model in models:
                    with gr.Accordion(model.name, open=model is models[0]):
                        texts.of(partial(_card, service, model.name), gr.Markdown)
            with gr.Tab("API", id="api-tab"):
                api_tab(service)
        ask_endpoint(service)
    limits = service.settings.limits
    page.queue(max_size=limits.demo_queue, default_concurrency_limit=4)
    bound_states(page, limits.demo_sessions)
    return page, texts


def title_of(service: Service) -> str:
    """-> what the page is called: what --title says, else what the models were trained on."""
    if service.settings.title:
        return service.settings.title
    bundle = next(iter(service.models.values())).bundle
    return f"{bundle.manifest.source.data}: which of {len(bundle.classes)} classes is it?"


def _card(service: Service, name: str) -> str:
    model = service.models.get(name)
    return reports.card(model.bundle) if model else "This model is unloaded."


def _heading(service: Service) -> str:
    models = list(service.models.values())
    classes = models[0].bundle.classes
    shown = f"{', '.join(classes[:12])}, …" if len(classes) > 12 else f"{', '.join(classes)}."
    kinds = "; ".join(f"{model.name}: {kind_of(model.bundle.manifest.target)}" for model in models[:6])
    return (
        f"<h1>{html.escape(title_of(service))}</h1><p>{html.escape(shown)}</p>"
        f'<p class="quiet">{html.escape(kinds)}. Every model answers each image, on this server.</p>'
    )


def kind_of(target: str) -> str:
    """-> what a target is, for a visitor."""
    if target.startswith("branch"):
        return "a small network by itself"
    return KINDS.get(target, "a classifier")


KINDS = {
    "fused": "the strong one, which joins small networks",
    "ensemble": "their average",
    "cascade": "a small network first, the strong one where that is unsure",
}


def _which_model_tab(service: Service, texts: Texts) -> None:
    texts.of(lambda: _served(service), gr.HTML)
    for folder in [report.folder for report in reports.reports(service.models.values())]:
        _report(service, folder, texts)
    if _unreported(service):
        texts.of(lambda: _variants(service), gr.HTML)
        gr.Markdown("There is no export report beside these bundles; `ffl-export --target all` writes one.")


def _served(service: Service) -> str:
    models = service.models.values()
    served = ", ".join(f"{model.name} ({model.variant.name} on {model.session.runtime})" for model in models)
    return f"<p>Measured at export, on the machine that exported. Served here: {html.escape(served)}.</p>"


def _report(service: Service, folder: Path, texts: Texts) -> None:
    """Show the report of an export, for as long as it lies there."""

    def found() -> reports.ShownReport | None:
        shown = reports.reports(service.models.values())
        return next((report for report in shown if report.folder == folder), None)

    def advice() -> str:
        report = found()
        said = report.advice if report else "the report of these bundles is gone"
        return f"<p><strong>What to ship:</strong> {html.escape(said)}</p>"

    def table() -> str:
        report = found()
        if report is None:
            return ""
        caption = f"Export report of {folder.name}, the most accurate first" + (
            f", measured with {report.machine}" if report.machine else ""
        )
        return sentences.table(caption, reports.REPORT_COLUMNS, report.rows, report.recommended)

    def picture() -> str | None:
        report = found()
        return (_copied(report.picture) if report and report.picture else "") or None

    texts.of(advice, partial(gr.HTML, elem_classes=["advice"]))
    texts.of(table, gr.HTML)
    if picture():
        texts.of(
            picture,
            partial(
                gr.Image,
                label="Accuracy against latency and size (Pareto)",
                alt_text="Accuracy against latency and size of every target and variant",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="pareto",
                elem_classes=["captioned"],
            ),
        )


def _unreported(service: Service) -> list[ServedModel]:
    """-> the models beside whose bundles no report lies."""
    models = list(service.models.values())
    covered = {report.folder for report in reports.reports(models)}
    return [model for model in models if model.bundle.folder.parent not in covered]


def _variants(service: Service) -> str:
    return sentences.table("Models and variants", reports.COLUMNS, reports.table(_unreported(service)))


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
    page, texts = await in_gradio_thread(build, service)
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
        footer_links=[],
        favicon_path=str(files("ffl_deploy.web") / "page" / "icon.svg"),
        theme=gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    (page_app,) = [
        route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, App)
    ]
    service.endless.append(page_app.stop_event.set)  # every open page holds a heartbeat stream
    service.changed.append(lambda: in_gradio_thread(texts.renew, page))
    async with app.router.lifespan_context(app), swept(page, upload_folder()):
        yield app
