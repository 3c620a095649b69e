"""What is in a chart of a report, read off its SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree


class Chart:
    """What matplotlib drew: texts with their places, lines, and marks as (x, y, colour, whether filled)."""

    def __init__(self, svg: str) -> None:
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        self.texts = [
            ("".join(node.itertext()).strip(), float(node.get("x", "nan")))
            for node in root.iter()
            if node.tag.endswith("text")
        ]
        self.names = [text for text, _ in self.texts]
        axes = next(node for node in root.iter() if node.get("id", "").endswith("axes_1"))
        drawn = [node for node in axes if "line2d" in node.get("id", "")]
        uses = [node for group in drawn for node in group.iter() if node.tag.endswith("use")]
        self.marks, self.rings = [], 0
        for node in uses:
            style = node.get("style", "")
            colour = re.search(r"stroke: var\(--series-(\d)\)", style)
            if colour:
                place = float(node.get("x", "nan")), float(node.get("y", "nan"))
                self.marks.append((*place, int(colour[1]), f"fill: var(--series-{colour[1]})" in style))
            else:
                self.rings += "currentColor" in style
        # Markers are defined inside <defs>, which hang below the groups.
        paths = [(node.get("d", ""), node.get("style", "")) for group in drawn for node in group if "path" in node.tag]
        self.lines = [
            (int(colour[1]), len(re.findall("[ML]", path)), "dash" in style, float(path.split()[1]))
            for path, style in paths
            if (colour := re.search(r"stroke: var\(--series-(\d)\)", style))
        ]
