"""How every report is made: a template, filled in, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fpcn_dist import __version__
from fpcn_dist.runtime.files import write_text

FILE = "report.html"


def write_page(folder: Path, template: str, **values: Any) -> Path:
    """Fill in a template of this package; gives the path of the page, ``folder``/report.html.

    Raises:
        UserError: it cannot be written.
    """
    templates = Environment(
        loader=PackageLoader("fpcn_dist.runs.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    write_text(folder / FILE, templates.get_template(template).render(**values, version=__version__))
    return folder / FILE
