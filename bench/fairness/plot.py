"""What happens over time, as an SVG: one panel for each rule, one line for each flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bench.fairness.simulator import TICK, History

_WIDTH, _HEIGHT, _MARGIN = 320, 220, 44
_COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#3b3b3b")


def draw(title: str, panels: dict[str, History]) -> str:
    """An SVG document of service received."""
    return draw_series(title, {name: history.received for name, history in panels.items()}, TICK)


def draw_series(title: str, panels: Mapping[str, Mapping[str, Sequence[float]]], tick: float = 1.0) -> str:
    """An SVG document: panel -> line -> values, `tick` seconds apart. All panels have the same scale."""
    seconds = max(tick * len(series) for lines in panels.values() for series in lines.values())
    most = max(max(series, default=0.0) for lines in panels.values() for series in lines.values())
    width = _MARGIN + len(panels) * (_WIDTH + _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 3 * _MARGIN}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_MARGIN}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, lines) in enumerate(panels.items()):
        parts += _panel(name, lines, _MARGIN + number * (_WIDTH + _MARGIN), tick / seconds, most)
        parts.append(
            f'<text x="{(number + 1) * (_WIDTH + _MARGIN)}" y="{_MARGIN + _HEIGHT + 16}" '
            f'text-anchor="end">{seconds:.0f} s</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _panel(name: str, lines: Mapping[str, Sequence[float]], left: float, scale: float, most: float) -> list[str]:
    top, bottom = _MARGIN, _MARGIN + _HEIGHT
    parts = [
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{left + 6}" y="{top + 16}" font-weight="bold">{escape(name)}</text>',
        f'<text x="{left}" y="{bottom + 16}">0</text>',
        f'<text x="{left - 4}" y="{top + 10}" text-anchor="end">{_short(most)}</text>',
    ]
    at = left + 6.0
    for number, (line, series) in enumerate(sorted(lines.items())):
        color = _COLORS[number % len(_COLORS)]
        points = " ".join(
            f"{left + tick * scale * _WIDTH:.1f},{bottom - value / most * _HEIGHT:.1f}"
            for tick, value in enumerate(series)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append(f'<text x="{at:.0f}" y="{bottom + 34}" fill="{color}">{escape(line)}</text>')
        at += 30 + 6.2 * len(line)
    return parts


def _short(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 1000 else f"{value:.0f}"
