"""A report as one HTML file: data, styles and code inside, nothing from the network.

The data is JSON in a script of a type that no browser runs, with every `<`, `>` and `&` escaped, and the page's code
makes text of it, never markup. The content security policy admits the page's own code by its hash and nothing else.
"""

import base64
import hashlib
import json
import math
from dataclasses import asdict
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from nmcompile.config import Phase
from nmcompile.printable import printable
from nmcompile.report.folding import fold_layers
from nmcompile.report.mask_tile import MaskTile, tile_of
from nmcompile.report.page_graph import graph_data
from nmcompile.report.page_layers import GraphTable, operand_shapes
from nmcompile.report.to_json import report_data

if TYPE_CHECKING:
    from nmcompile.report.report import Report

PAGE = files("nmcompile.report") / "html"
LIBRARIES = "dagre.min.js", "panzoom.min.js", "chart.umd.min.js"
CODE = "dom", "data", "cards", "reasons", "table", "picture", "graph", "mask", "details", "charts", "main"
ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


def to_html(report: "Report") -> str:
    """Return the page of a report."""
    scripts = [_read(f"vendor/{name}") for name in LIBRARIES] + [_own_code()]
    return Template(_read("page.html")).substitute(
        title=printable(f"{report.model_name}, {report.mode}").translate(MARKUP),
        policy=" ".join(map(_hash, scripts)),
        style=_read("page.css"),
        data=json.dumps(_finite(page_data(report)), allow_nan=False).translate(ESCAPES),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def page_data(report: "Report") -> dict[str, object]:
    """Return the report's JSON as `report`, and beside it what only the page shows."""
    whole, graphs = report.program.captured.whole, GraphTable()
    shapes, tiles = operand_shapes(whole, report.layers), _tiles(report)
    place = {layer.name: number for number, layer in enumerate(report.layers)}
    layers = [
        {
            "operands": {phase.value: layer.operands(phase) for phase in Phase},
            "note": layer.note,
            "why_dense": {phase.value: choice.why_dense for phase, choice in layer.choices.items()},
            "graphs": graphs.number(layer, shapes[layer.name]),
            "tile": asdict(tiles[layer.name]) if layer.name in tiles else None,
        }
        for layer in report.layers
    ]
    folds = [
        {"name": fold.name, "layers": [place[layer.name] for layer in fold.layers]}
        for fold in fold_layers(report.layers)
    ]
    return {
        "report": report_data(report),
        "layers": layers,
        "graphs": graphs.graphs,
        "folds": folds,
        "graph": graph_data(whole, report.layers),
        "graph_reason": report.graph_reason,
    }


def _tiles(report: "Report") -> dict[str, MaskTile]:
    plans = {layer.name: layer.plan for layer in report.layers}
    tiles = ((name, tile_of(plans[name], weight, mask)) for name, weight, mask in report.masks())
    return {name: tile for name, tile in tiles if tile is not None}


def _finite(value: object) -> object:
    """Return data with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _own_code() -> str:
    """Return the page's code: its files in order, in one function."""
    parts = "\n".join(_read(f"{name}.js") for name in CODE)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def _read(name: str) -> str:
    return PAGE.joinpath(*name.split("/")).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
