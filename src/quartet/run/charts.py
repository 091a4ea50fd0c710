"""Line charts as inline SVG: a frame, two axes with round numbers, a line for each series, a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 34
_COLOURS = ("#1f6fb4", "#d1600f", "#2b8a3e", "#a02c7a", "#7a6a00", "#555555")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, series: Mapping[str, Points], *, x_label: str) -> str:
    """One chart; points that are not finite are left out, and a chart without points says so."""
    lines = {
        name: [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])] for name, points in series.items()
    }
    known = [point for points in lines.values() for point in points]
    parts = [f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>']
    if known:
        parts += _chart(lines, _Axis(x for x, _ in known), _Axis(y for _, y in known), x_label)
    else:
        parts.append(f'<text x="{_LEFT}" y="60">no values</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


class _Axis:
    """A range of numbers with about five round ones in it."""

    def __init__(self, numbers: Iterable[float]) -> None:
        given = list(numbers)
        low, high = min(given), max(given)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        self.step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
        self.low, self.high = low, high

    def ticks(self) -> list[float]:
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        return [number * self.step for number in range(first, last + 1)]

    def place(self, value: float, start: float, end: float) -> float:
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def _chart(lines: Mapping[str, Points], x: _Axis, y: _Axis, x_label: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" class="frame"/>']
    for tick in y.ticks():
        at = y.place(tick, bottom, _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{at + 3.5:.1f}" class="end">{tick:.4g}</text>')
    for tick in x.ticks():
        at = x.place(tick, _LEFT, right)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 14}" class="middle">{tick:.4g}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" class="end">{escape(x_label)}</text>')
    shown = {name: points for name, points in lines.items() if points}
    for number, (name, points) in enumerate(shown.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(x.place(a, _LEFT, right), y.place(b, bottom, _TOP)) for a, b in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" stroke="{colour}" class="line"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.6" fill="{colour}"/>' for a, b in places]
        if len(shown) > 1:
            parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 13 + 13 * number}" fill="{colour}">{escape(name)}</text>')
    return parts
