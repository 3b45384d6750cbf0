"""Forecasts along each source's weight, with their intervals, as one SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stages.emission.plots import ticks

_LEFT, _RIGHT, _HEIGHT, _GAP = 64.0, 620.0, 130.0, 52.0

_STYLE = (
    "<style>svg{background:#fff;color:#222}text{font:12px system-ui,sans-serif;fill:currentColor}"
    ".grid{stroke:currentColor;stroke-opacity:.15;fill:none}"
    ".band{fill:#2a6fbb;fill-opacity:.18}.line{stroke:#2a6fbb;stroke-width:1.6;fill:none}"
    ".at{stroke:#b5482a;stroke-width:1.4;stroke-dasharray:4 3;fill:none}"
    "@media(prefers-color-scheme:dark){svg{background:#181818;color:#ddd}"
    ".band{fill:#79b4f2}.line{stroke:#79b4f2}.at{stroke:#e58a6f}}</style>"
)


def forecast_curve(report: Mapping[str, Any]) -> str:
    """Forecast loss at the budget over the weight of each source, the others in proportion.

    Args:
        report: of pilots.
    """
    panels = report["curve"]
    values = [number for panel in panels for point in panel["points"] for number in point[1:]]
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or 0.5
    drawn = [
        _panel(panel, low - pad, high + pad, 48 + i * (_HEIGHT + _GAP))
        for i, panel in enumerate(panels)
    ]
    foot = 48 + len(panels) * (_HEIGHT + _GAP)
    told = report["recommended"]
    title = (
        f"forecast loss at {report['projection']['budget']:,} rows, form {told['form']}, "
        f"{told['coverage']:.0%} intervals of the fits"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {foot:.0f}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}<text x="{_LEFT}" y="18">{escape(title)}</text>'
        f"{''.join(drawn)}</svg>\n"
    )


def _panel(panel: Mapping[str, Any], low: float, high: float, top: float) -> str:
    """One source: its band, line, and the recommended weight."""
    bottom = top + _HEIGHT

    def across(weight: float) -> float:
        return _LEFT + weight * (_RIGHT - _LEFT)

    def up(loss: float) -> float:
        return bottom - (loss - low) / (high - low) * _HEIGHT

    parts = [f'<text x="{_LEFT}" y="{top - 8}">weight of {escape(panel["source"])}</text>']
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(value):.1f}H{_RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    points: Sequence[Sequence[float]] = panel["points"]
    above = [f"{across(p[0]):.1f} {up(p[3]):.1f}" for p in points]
    below = [f"{across(p[0]):.1f} {up(p[2]):.1f}" for p in reversed(points)]
    parts.append(f'<path class="band" d="M{"L".join([*above, *below])}Z"/>')
    middle = [f"{across(p[0]):.1f} {up(p[1]):.1f}" for p in points]
    parts.append(f'<path class="line" d="M{"L".join(middle)}"/>')
    parts.append(f'<path class="at" d="M{across(panel["weight"]):.1f} {top}V{bottom}"/>')
    return "".join(parts)
