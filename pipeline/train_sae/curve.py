"""The training curve as one SVG file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from stages.emission.plots import ticks

if TYPE_CHECKING:
    from stages.dictionary.train import TrainingPoint

_LEFT, _RIGHT, _HEIGHT, _GAP = 56.0, 620.0, 110.0, 44.0

_STYLE = (
    "<style>svg{background:#fff;color:#222}text{font:12px system-ui,sans-serif;fill:currentColor}"
    ".grid{stroke:currentColor;stroke-opacity:.15;fill:none}"
    ".line{stroke:#2a6fbb;stroke-width:1.6;fill:none}"
    "@media(prefers-color-scheme:dark){svg{background:#181818;color:#ddd}.line{stroke:#79b4f2}}"
    "</style>"
)


def training_curve(points: Sequence[TrainingPoint], batch: int) -> str:
    """FVU, active latents and dead latents over the tokens trained on.

    Args:
        points: measures of single batches, by rising step.
        batch: tokens of a batch.
    """
    tokens = [float(point.step * batch) for point in points]
    panels = [
        ("fraction of variance unexplained", [point.fvu for point in points]),
        ("active latents a token", [point.l0 for point in points]),
        ("share of dead latents", [point.dead_share for point in points]),
    ]
    drawn = [
        _panel(title, tokens, values, 28 + i * (_HEIGHT + _GAP))
        for i, (title, values) in enumerate(panels)
    ]
    foot = 28 + len(panels) * (_HEIGHT + _GAP)
    middle = (_LEFT + _RIGHT) / 2
    label = f'<text x="{middle}" y="{foot + 4}" text-anchor="middle">tokens trained on</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {foot + 16:.0f}" '
        f'role="img" aria-label="training curve">{_STYLE}{"".join(drawn)}{label}</svg>\n'
    )


def _panel(title: str, tokens: Sequence[float], values: Sequence[float], top: float) -> str:
    """One measure from zero up, its title above it."""
    bottom, most = top + _HEIGHT, max(tokens, default=0.0) or 1.0
    high = max(values, default=0.0) * 1.05 or 1.0

    def across(value: float) -> float:
        return _LEFT + value / most * (_RIGHT - _LEFT)

    def up(value: float) -> float:
        return bottom - value / high * _HEIGHT

    parts = [f'<text x="{_LEFT}" y="{top - 10}">{escape(title)}</text>']
    for value in ticks(0.0, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(value):.1f}H{_RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in ticks(0.0, most):
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:,.0f}</text>'
        )
    spots = [f"{across(t):.1f} {up(v):.1f}" for t, v in zip(tokens, values, strict=True)]
    if spots:
        parts.append(f'<path class="line" d="M{"L".join(spots)}"/>')
    return "".join(parts)
