"""Headless Chromium, driven by its command line: how a page looks to a reader, and what it asks of the network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no Chromium to render the report with: apt-get install chromium"

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1280,900",
)  # fmt: skip
# The browser's own calls home, which no switch stops entirely.
_OWN_HOSTS = re.compile(r"https?://([\w.-]+\.)?(google|googleapis|gvt1|gstatic)\.com/")

# The page in frames of a phone's and a desktop's width, and what a script outside of it reads off them.
_WRAPPER = """<!doctype html><meta charset="utf-8">
<iframe src="{url}" style="width:375px;height:800px;border:0"></iframe>
<iframe src="{url}" style="width:1200px;height:800px;border:0"></iframe>
<pre></pre>
<script>
onload = () => {{
  document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument;
    return {{
      scroll_width: page.documentElement.scrollWidth,
      client_width: page.documentElement.clientWidth,
      text: page.body.innerText,
      background: getComputedStyle(page.body).backgroundColor,
      charts: [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100).length,
      images: [...page.images].map(image => image.naturalWidth),
      text_heights: [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height),
    }};
  }}));
}};
</script>
"""


@dataclass(frozen=True)
class Frame:
    """The page at one width; sizes in CSS pixels."""

    scroll_width: int
    client_width: int
    text: str
    background: str
    charts: int
    images: list[int]
    text_heights: list[float]


@dataclass(frozen=True)
class Rendering:
    """What Chromium made of a page: on a phone, on a desktop, and on the way there."""

    phone: Frame
    desktop: Frame
    console: list[str]
    requests: list[str]


def render(page: Path, folder: Path, *, dark: bool = False) -> Rendering:
    """Load ``page`` in Chromium; ``folder`` is for its files."""
    folder.mkdir()
    wrapper = folder / "wrapper.html"
    wrapper.write_text(_WRAPPER.format(url=page.as_uri()), encoding="utf-8")
    log = folder / "network.json"
    done = subprocess.run(
        [
            str(BINARY), *_OPTIONS, *(["--force-dark-mode"] if dark else []), f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}", "--dump-dom", wrapper.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert done.returncode == 0 and found and found[1], f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&")
    phone, desktop = (Frame(**frame) for frame in json.loads(unescaped))
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]*)"', log.read_text(encoding="utf-8")))
    return Rendering(
        phone, desktop,
        console=[line for line in done.stderr.splitlines() if "CONSOLE" in line],
        requests=sorted(url for url in urls if not _OWN_HOSTS.match(url)),
    )  # fmt: skip
