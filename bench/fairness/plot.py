"""Service received over time, as an SVG: one panel for each rule, one line for each flow."""

from __future__ import annotations

from html import escape

from bench.fairness.simulator import TICK, History

_WIDTH, _HEIGHT, _MARGIN = 320, 220, 44
_COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#3b3b3b")


def draw(title: str, panels: dict[str, History]) -> str:
    """An SVG document; all panels have the same scale."""
    seconds = max(TICK * len(series) for history in panels.values() for series in history.received.values())
    most = max(max(series, default=0.0) for history in panels.values() for series in history.received.values())
    width = _MARGIN + len(panels) * (_WIDTH + _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 3 * _MARGIN}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_MARGIN}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, history) in enumerate(panels.items()):
        parts += _panel(name, history, _MARGIN + number * (_WIDTH + _MARGIN), seconds, most)
    return "\n".join([*parts, "</svg>\n"])


def _panel(name: str, history: History, left: float, seconds: float, most: float) -> list[str]:
    top, bottom = _MARGIN, _MARGIN + _HEIGHT
    parts = [
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{left + 6}" y="{top + 16}" font-weight="bold">{escape(name)}</text>',
        f'<text x="{left}" y="{bottom + 16}">0</text>',
        f'<text x="{left + _WIDTH}" y="{bottom + 16}" text-anchor="end">{seconds:.0f} s</text>',
        f'<text x="{left - 4}" y="{top + 10}" text-anchor="end">{most / 1000:.0f}k</text>',
    ]
    for number, (flow, series) in enumerate(sorted(history.received.items())):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(
            f"{left + tick * TICK / seconds * _WIDTH:.1f},{bottom - value / most * _HEIGHT:.1f}"
            for tick, value in enumerate(series)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append(f'<text x="{left + 6 + 90 * number}" y="{bottom + 34}" fill="{color}">{escape(flow)}</text>')
    return parts
