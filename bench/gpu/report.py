"""Figures, each beside its floor, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        section: of the report.
        case: what was measured, in words.
        value, floor: in `unit`; the floor is the least that bytes or operations allow, None where there is none.
        is_rate: whether more is better; then the floor is a ceiling.
    """

    section: str
    case: str
    value: float
    unit: str
    floor: float | None = None
    is_rate: bool = False

    @property
    def share(self) -> str:
        """How far from the floor."""
        if not self.floor:
            return ""
        return f"{self.value / self.floor:.0%}" if self.is_rate else f"{self.value / self.floor:.2f}x"

    @property
    def row(self) -> str:
        floor = "" if self.floor is None else f"{self.floor:.4g}"
        return f"| {self.case} | {self.value:.4g} {self.unit} | {floor} | {self.share} |"


@dataclass
class Report:
    """Everything that was found. Written again after every section, so that what was measured is kept."""

    title: str
    facts: list[str]
    path: Path | None
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure) -> Figure:
        """Takes a figure and prints it."""
        print(f"{'(dry run) ' if self.path is None else ''}{figure.section} {figure.row}", flush=True)
        self.figures.append(figure)
        return figure

    def note(self, text: str) -> None:
        """Takes a remark, such as what there was no time for."""
        print(text, flush=True)
        self.notes.append(text)

    def write(self) -> None:
        """Writes the tables and the plot, where this is a measurement."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".md").write_text(self.text(), encoding="utf-8")
        lines = kept_lines(self.figures)
        if lines:
            self.path.with_suffix(".svg").write_text(plot(lines), encoding="utf-8")

    def text(self) -> str:
        """As Markdown."""
        parts = [f"# {self.title}\n", *(f"- {fact}" for fact in self.facts)]
        for section in dict.fromkeys(figure.section for figure in self.figures):
            parts += [f"\n## {section}\n", "| case | measured | floor | of it |", "|---|---|---|---|"]
            parts += [figure.row for figure in self.figures if figure.section == section]
        return "\n".join([*parts, "", *(f"- {note}" for note in self.notes), ""])


KEPT = "kept of the base's decode rate"


def kept_lines(figures: Iterable[Figure]) -> dict[str, list[tuple[int, float]]]:
    """By name of the line, (adapters, share kept); measured and possible."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for figure in figures:
        if KEPT not in figure.section or figure.floor is None:
            continue
        batch, adapters, rank = figure.case.split(", ")
        name, count = f"{rank}, {batch}", int(adapters.split()[0])
        lines.setdefault(name, []).append((count, figure.value))
        lines.setdefault(f"{name}, possible", []).append((count, figure.floor))
    return lines


_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e")


def plot(lines: dict[str, list[tuple[int, float]]]) -> str:
    """Share kept over the number of distinct adapters, as SVG; what is possible is dashed."""
    wide, high, left, top = 640, 380, 60, 20
    counts = sorted({count for line in lines.values() for count, _ in line})
    across = {count: left + place * wide / max(1, len(counts) - 1) for place, count in enumerate(counts)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 240}" height="{top + high + 60}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for tenth in range(0, 11, 2):
        y = top + high * (1 - tenth / 10)
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{tenth * 10} %</text>')
    parts += [
        f'<text x="{x:.0f}" y="{top + high + 20}" text-anchor="middle">{count}</text>' for count, x in across.items()
    ]
    parts.append(f'<text x="{left + wide / 2}" y="{top + high + 45}" text-anchor="middle">distinct adapters</text>')
    solid = [name for name in lines if not name.endswith("possible")]
    for place, name in enumerate(solid):
        color = _COLORS[place % len(_COLORS)]
        for key, dash in ((name, ""), (f"{name}, possible", ' stroke-dasharray="4 4"')):
            points = " ".join(
                f"{across[x]:.0f},{top + high * (1 - min(share, 1)):.0f}" for x, share in sorted(lines[key])
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        y = top + 16 * (place + 1)
        parts.append(f'<text x="{left + wide + 12}" y="{y}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
