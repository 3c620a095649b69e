"""Every report is a template, filled in, as one HTML file."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fpcn_dist import __version__
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import printable_lines

REPORT_FILE = "report.html"


def write_page(folder: Path, template: Path, **values: object) -> Path:
    """Fill in a template, which may extend base.html.j2 of this package, and return the path of ``folder``/report.html.

    Raises:
        UserError: it cannot be written.
    """
    folders = FileSystemLoader([template.parent, Path(__file__).parent])
    templates = Environment(
        loader=folders,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable_lines(value) if type(value) is str else value,  # not markup, which is ours
    )
    write_text(folder / REPORT_FILE, templates.get_template(template.name).render(**values, version=__version__))
    return folder / REPORT_FILE
