"""The report as one HTML file that needs nothing else: styles inline, figures as data URIs, all text escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = "page.html.j2"


def data_uri(file: Path) -> str:
    """A PNG file as the value of an `src`."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def page(content: Mapping[str, Any], template: str = TEMPLATE) -> str:
    """Fill in a template of this folder; what it is given is text, never markup (`autoescape`), because some of it is a
    model's."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)
