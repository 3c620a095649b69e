"""Headless Chromium, driven by its command line: how a page looks to a reader, and what it asks of the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium to render the report with: apt-get install chromium"

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--window-size=1280,900",
)
# The browser's own calls home, which no switch stops entirely.
_OWN_HOSTS = re.compile(r"https?://([\w.-]+\.)?(google|googleapis|gvt1|gstatic)\.com/")

# A page with others in frames, and what a script outside of them reads off them once they are there.
_WRAPPER = """<!doctype html><meta charset="utf-8">
{frames}
<pre></pre>
<script>
onload = () => {{
  const pages = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument);
  document.querySelector("pre").textContent = JSON.stringify(({script})(pages));
}};
</script>
"""
_WIDTHS = {"phone": 375, "desktop": 1200, "paper": 718}
"""CSS pixels; A4 less a centimetre on either side."""

# The page on paper is one whose print rules hold on a screen.
_LOOK = """pages => pages.map((page, number) => {
  if (number === 2) for (const sheet of page.styleSheets) for (const rule of sheet.cssRules) {
    const media = rule.media?.mediaText ?? "";
    if (media === "print") rule.media.mediaText = "all";
    if (media.startsWith("screen")) rule.media.mediaText = "not all";
  }
  return {
    scroll_width: page.documentElement.scrollWidth,
    client_width: page.documentElement.clientWidth,
    text: page.body.innerText,
    background: getComputedStyle(page.body).backgroundColor,
    charts: [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100).length,
    images: [...page.images].map(image => image.naturalWidth),
    text_heights: [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height),
    clipped: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
    code: [...page.querySelectorAll("pre")].filter(code => code.checkVisibility()).map(code => code.textContent),
  };
})"""

# A box that scrolls holds what is wider than itself.
_OVERFLOW = """pages => pages.map(page => ({
  scroll_width: page.documentElement.scrollWidth,
  client_width: page.documentElement.clientWidth,
  outside: [...page.querySelectorAll("section *, header *")].filter(
    element => !element.parentElement.closest(".scroll, svg")
      && element.getBoundingClientRect().right > element.closest("section, header").getBoundingClientRect().right + 1
  ).map(element => element.outerHTML.slice(0, 80)),
}))"""

_CLICK = """([page]) => %s.map(([table, column]) => {
  const rows = page.querySelectorAll("table")[table];
  const button = rows.querySelector(`[data-column="${column}"] button`);
  button?.focus();
  button?.click();
  return {
    focused: button !== null && page.activeElement === button,
    heads: Object.fromEntries([...rows.querySelectorAll("[aria-sort]")].map(
      head => [head.dataset.column, head.getAttribute("aria-sort")])),
    rows: [...rows.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent)),
  };
})"""


@dataclass(frozen=True)
class Frame:
    """The page at one width; sizes in CSS pixels.

    Attributes:
        charts: how many are tall enough to be read.
        images: widths of the images, 0 for one that did not load.
        clipped: how many boxes must be scrolled sideways, which paper cannot be.
        code: texts of the commands that are in sight.
    """

    scroll_width: int
    client_width: int
    text: str
    background: str
    charts: int
    images: list[int]
    text_heights: list[float]
    clipped: int
    code: list[str]


@dataclass(frozen=True)
class Rendering:
    """What Chromium made of a page: on a phone, on a desktop, on paper, and on the way there."""

    phone: Frame
    desktop: Frame
    paper: Frame
    console: list[str]
    requests: list[str]


@dataclass(frozen=True)
class Sorting:
    """A table after a click: whether the button had the focus, ``aria-sort`` by column, and the cells of each row."""

    focused: bool
    heads: dict[str, str]
    rows: list[list[str]]


def render(page: Path, folder: Path, *, dark: bool = False) -> Rendering:
    """Load ``page`` in Chromium; ``folder`` is for its files."""
    values, console, requests = _load(page, folder, list(_WIDTHS.values()), _LOOK, dark=dark)
    return Rendering(*(Frame(**frame) for frame in values), console=console, requests=requests)


@dataclass(frozen=True)
class Overflow:
    """What is too wide for the page at one width: the page itself, in CSS pixels, and elements beyond their card."""

    scroll_width: int
    client_width: int
    outside: list[str]


def overflow(page: Path, folder: Path, widths: Sequence[int]) -> list[Overflow]:
    """Load ``page`` at several widths in CSS pixels, and look for what does not fit."""
    return [Overflow(**value) for value in _load(page, folder, widths, _OVERFLOW, dark=False)[0]]


def click(page: Path, folder: Path, clicks: Sequence[tuple[int, int]]) -> tuple[list[Sorting], list[str]]:
    """Click heads of tables, each given as (table, column), one after the other; and the console's messages."""
    script = _CLICK % json.dumps(clicks)
    values, console, _ = _load(page, folder, [_WIDTHS["desktop"]], script, dark=False)
    return [Sorting(**value) for value in values], console


def print_pages(page: Path, folder: Path) -> Path:
    """Print ``page`` to a PDF in ``folder``, and give its path."""
    folder.mkdir()
    pdf = folder / "page.pdf"
    _run(folder, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    return pdf


def _load(
    page: Path, folder: Path, widths: Sequence[int], script: str, *, dark: bool
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """What a script returns for frames of the page, messages of the console, and addresses that were asked for."""
    folder.mkdir()
    wrapper, log = folder / "wrapper.html", folder / "network.json"
    frames = [f'<iframe src="{page.as_uri()}" style="width:{w}px;height:800px;border:0"></iframe>' for w in widths]
    wrapper.write_text(_WRAPPER.format(frames="\n".join(frames), script=script), encoding="utf-8")
    mode = ["--force-dark-mode"] if dark else []
    done = _run(folder, *mode, f"--log-net-log={log}", "--dump-dom", wrapper.as_uri())
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found and found[1], f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&")
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text(encoding="utf-8")))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescaped), console, sorted(url for url in urls if not _OWN_HOSTS.match(url))


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(BINARY), *_OPTIONS, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done
