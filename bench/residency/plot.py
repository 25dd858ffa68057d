"""Bars as SVG text."""

from __future__ import annotations

ROW, BAR, LABEL, WIDTH, MOST = 12, 10, 120, 620, 2.5
COLOURS = ("#9aa5b1", "#b8a9c9", "#a8c0a0", "#d0b48c", "#a9c4d6", "#1f5fa8")


def bars(groups: list[tuple[str, dict[str, float]]]) -> str:
    """One group of bars for each trace, one bar for each policy: bytes moved as a multiple of the bound, up to MOST."""
    names = list(groups[0][1])
    height = 40 + len(groups) * (len(names) * ROW + 10)
    scale = (WIDTH - LABEL - 50) / (MOST - 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="4" y="12">Bytes moved to the device beyond the bound (the bound is 1.00)</text>',
    ]
    for number, name in enumerate(names):
        x = LABEL + number * 75
        parts.append(f'<rect x="{x}" y="18" width="8" height="8" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="{x + 11}" y="26">{name}</text>')
    y = 36
    for trace, values in groups:
        parts.append(f'<text x="4" y="{y + len(names) * ROW / 2 + 3}">{trace}</text>')
        for number, value in enumerate(values.values()):
            length = max(1.0, (min(value, MOST) - 1.0) * scale)
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[number]}"/>')
            parts.append(f'<text x="{LABEL + length + 3:.1f}" y="{y + 9}">{value:.2f}</text>')
            y += ROW
        y += 10
    return "\n".join([*parts, "</svg>"]) + "\n"
