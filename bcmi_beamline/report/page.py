"""One self-contained HTML page from numbers and figures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure


@dataclass
class Section:
    """A heading, a sentence or two, and figures with their captions.

    Parameters
    ----------
    title : str
    text : str
        What the reader should see in the figures.
    figures : dict of str to (Figure, str)
        File stem to figure and caption.
    """

    title: str
    text: str = ""
    figures: dict[str, tuple[Figure, str]] = field(default_factory=dict)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    table: list[list[str]],
    sections: list[Section],
    details: dict[str, Any] | None = None,
    figures_dir: Path | None = None,
) -> None:
    """Write `path`, a page that needs no other file.

    Parameters
    ----------
    path : path
    title, subtitle : str
    table : list of rows
        The first row is the heading; shown at the top.
    sections : list of Section
    details : dict, optional
        Shown folded at the end: provenance and parameters.
    figures_dir : path, optional
        Also keep every figure there as PNG.
    """
    shown = []
    for section in sections:
        figures = []
        for stem, (figure, caption) in section.figures.items():
            png = _png(figure)
            if figures_dir is not None:
                figures_dir.mkdir(parents=True, exist_ok=True)
                (figures_dir / f"{stem}.png").write_bytes(png)
            figures.append({"caption": caption, "data": base64.b64encode(png).decode()})
        shown.append({"title": section.title, "text": section.text, "figures": figures})
    environment = Environment(
        loader=PackageLoader("bcmi_beamline.report", "."), autoescape=select_autoescape()
    )
    page = environment.get_template("page.html").render(
        title=title, subtitle=subtitle, table=table, sections=shown, details=details or {}
    )
    path.write_text(page, encoding="utf-8")
