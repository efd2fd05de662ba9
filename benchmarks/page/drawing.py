"""`python -m benchmarks.page.drawing`: docs/ffl.svg, what FFL is in one picture."""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path

from ffl_deploy.command import Parser, run_command
from ffl_deploy.errors import DONE
from ffl_deploy.files import write_atomically

DRAWING = Path("docs/ffl.svg")
WIDTH, HEIGHT = 920, 330
ALTERNATIVE = (
    "Two branches share low-level layers; a fusion module joins their feature maps into a fused classifier; "
    "the ensemble of the branches teaches the fused classifier, which teaches each branch"
)
# One rule for light and for dark pages: SVG inside <img> follows the reader's setting.
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.small { font-size: 12.5px; fill: #57606a }
.box { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.5 }
.strong { fill: #ddf4ff; stroke: #0969da; stroke-width: 2 }
.flow { stroke: #57606a; stroke-width: 1.8; fill: none; marker-end: url(#flow) }
.teach { stroke: #bc4c00; stroke-width: 2; fill: none; stroke-dasharray: 6 4; marker-end: url(#teach) }
.taught { fill: #bc4c00; font-size: 12.5px }
#flow path { fill: #57606a } #teach path { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .box { fill: #212830; stroke: #9198a1 }
  .strong { fill: #10243e; stroke: #4493f8 } .flow { stroke: #9198a1 } #flow path { fill: #9198a1 }
  .teach { stroke: #f0883e } .taught { fill: #f0883e } #teach path { fill: #f0883e }
}
"""


def box(x: int, y: int, width: int, lines: Sequence[str], kind: str = "box", height: int = 54) -> str:
    """-> a rounded box with its top left corner at (x, y); the second line is small."""
    middle = x + width / 2
    first = y + height / 2 + (5 if len(lines) == 1 else -3)
    texts = [f'<text x="{middle:g}" y="{first:g}">{html.escape(lines[0])}</text>']
    small = '<text class="small" x="{:g}" y="{:g}">{}</text>'
    texts += [small.format(middle, first + 18, html.escape(line)) for line in lines[1:]]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>' + "".join(texts)


def arrow(path: str, kind: str = "flow") -> str:
    """-> an arrow along an SVG path."""
    return f'<path class="{kind}" d="{path}"/>'


def label(x: int, y: int, text: str, kind: str = "taught") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{html.escape(text)}</text>'


def head(name: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z"/></marker>'
    )


def drawing() -> str:
    """-> the SVG."""
    shapes = [
        # what every image passes
        box(20, 138, 110, ["image"]),
        box(170, 138, 130, ["shared layers", "low-level features"]),
        box(350, 40, 130, ["branch 0", "its own layers"]),
        box(350, 236, 130, ["branch 1", "its own layers"]),
        box(350, 138, 130, ["fusion module", "joins feature maps"]),
        box(600, 40, 150, ["classifier 0"], "strong"),
        box(600, 138, 150, ["fused classifier"], "strong"),
        box(600, 236, 150, ["classifier 1"], "strong"),
        arrow("M130 165 H164"),
        arrow("M300 165 C325 165 325 67 344 67"),
        arrow("M300 165 C325 165 325 263 344 263"),
        arrow("M415 94 V132"),
        arrow("M415 236 V198"),
        arrow("M480 67 H594"),
        arrow("M480 165 H594"),
        arrow("M480 263 H594"),
        # who teaches whom
        arrow("M750 55 C860 60 860 150 756 158", "teach"),
        arrow("M750 275 C860 270 860 180 756 172", "teach"),
        arrow("M660 138 V100", "teach"),
        arrow("M660 192 V230", "teach"),
        label(845, 108, "their ensemble"),
        label(845, 125, "teaches the fused"),
        label(566, 118, "the fused teaches"),
        label(566, 222, "each branch"),
        label(460, 318, "After one training run each of the three is exported by itself, as ONNX.", "small"),
    ]
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{ALTERNATIVE}">\n<style>{STYLE}</style>\n<defs>{head("flow")}{head("teach")}</defs>\n'
        f"{body}\n</svg>\n"
    )


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks.page.drawing",
        description="Write docs/ffl.svg.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DRAWING, metavar="SVG", help="(default: docs/ffl.svg)")
    arguments = parser.parse_args(argv)
    write_atomically(arguments.out, drawing())
    print(arguments.out)
    return DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
