"""The pad on which digits are drawn: a plain canvas. Gradio's own wants a tool chosen first,
and no keyboard reaches it."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import gradio as gr

HTML = """
<div class="pad">
  <div class="paper">
    <canvas width="280" height="280" tabindex="0" role="img"
      aria-label="Drawing pad. Arrow keys move the pen, Space lowers and lifts it, Delete clears."></canvas>
    <span class="pen" aria-hidden="true"></span>
    <span class="hint" aria-hidden="true">Draw here</span>
  </div>
  <button type="button">Clear</button>
</div>
"""
CSS = """
.pad {display: flex; flex-direction: column; gap: 0.75rem; align-items: stretch;
  max-width: 320px; margin: 0 auto;}
.paper {position: relative; line-height: 0;}
canvas {width: 100%; border: 1px solid var(--border-color-primary); border-radius: 8px;
  touch-action: none; cursor: crosshair; background: #fff;}
.pen {position: absolute; width: 12px; height: 12px; margin: -6px; left: 50%; top: 50%; border-radius: 50%;
  border: 2px solid #ea580c; pointer-events: none; visibility: hidden;}
canvas:focus-visible + .pen {visibility: visible;}
.hint {position: absolute; inset: 0; display: grid; place-items: center; pointer-events: none;
  line-height: normal; color: #57606a; font-size: 1.2rem;}
.hint.gone {display: none;}
.pen.down {background: #ea580c;}
button {padding: 0.6rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color);
  cursor: pointer;}
"""


def drawing_pad() -> gr.HTML:
    """-> a component whose event `submit` brings the drawing; see `drawing_of`."""
    script = Path(__file__).with_name("draw.js").read_text(encoding="utf-8")
    return gr.HTML(html_template=HTML, css_template=CSS, js_on_load=script, elem_id="pad")


def drawing_of(event: Any) -> bytes | None:
    """-> the encoded image that an event of the pad carries; None when it carries none."""
    text = (event._data or {}).get("drawing") if isinstance(event._data, dict) else None
    if not isinstance(text, str) or not text.startswith("data:image/png;base64,"):
        return None
    try:
        return base64.b64decode(text.partition(",")[2], validate=True)
    except binascii.Error:
        return None
