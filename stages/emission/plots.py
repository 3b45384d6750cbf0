"""Charts as inline SVG: coloured by the page's CSS, so that they follow its light or dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Values = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]


def common_range(values: Values) -> tuple[float, float]:
    """The range of the middle 99 % of the finite values, widened where it is empty."""
    known = values[np.isfinite(values)]
    low, high = (float(edge) for edge in np.quantile(known, (0.005, 0.995)))
    pad = 0.5 if high - low < 1e-9 else 0.0
    return low - pad, high + pad


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside a range, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = float(next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999))
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor(high / step + 1e-9))
    return [round(i * step, 10) for i in range(first, last + 1)]


def histogram(
    filled: Values,
    outlined: Values,
    low: float,
    high: float,
    label: str,
    names: tuple[str, str] = ("all rows", "emitted rows"),
) -> Markup:
    """Two distributions over one axis, each as shares of its own rows.

    Values outside the range count in the outermost bins.

    Args:
        filled: finite values.
        outlined: finite values.
        low: left end of the axis.
        high: right end of the axis.
        label: for screen readers.
        names: of the two.
    """
    bins, left, right, top, bottom = 28, 6.0, 314.0, 8.0, 104.0
    width = (right - left) / bins
    edges = np.linspace(low, high, bins + 1)
    under, over = _shares(filled, edges), _shares(outlined, edges)
    peak = max(float(under.max()), float(over.max()), 1e-9)

    def height(share: float) -> float:
        return bottom - share / peak * (bottom - top)

    bars = [
        f'<rect class="c-all" x="{left + i * width + 0.5:.1f}" y="{height(share):.1f}" '
        f'width="{width - 1:.1f}" height="{bottom - height(share):.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {share:.1%} of "
        f"{escape(names[0])}, {over[i]:.1%} of {escape(names[1])}</title></rect>"
        for i, share in enumerate(under.tolist())
    ]
    path = ""
    if len(outlined):
        steps = [f"M{left:.1f} {bottom:.1f}"]
        for i, share in enumerate(over.tolist()):
            steps.append(f"V{height(share):.1f}H{left + (i + 1) * width:.1f}")
        path = f'<path class="c-line" d="{"".join(steps)}V{bottom:.1f}"/>'
    return _svg(320, 126, label, "".join(bars) + path + _axis(low, high, left, right, bottom))


def scatter(before: Values, after: Values, label: str) -> Markup:
    """Points over a diagonal; at most 1,500 of them, evenly taken.

    Args:
        before: finite values, horizontal.
        after: finite values of the same rows, vertical.
        label: for screen readers.
    """
    low, high = common_range(np.concatenate([before, after]))
    left, right, top, bottom = 44.0, 396.0, 10.0, 312.0
    chosen = np.unique(np.linspace(0, len(before) - 1, min(len(before), 1_500)).astype(int))

    def spot(x: float, y: float) -> tuple[float, float]:
        across = min(max((x - low) / (high - low), 0.0), 1.0)
        up = min(max((y - low) / (high - low), 0.0), 1.0)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for value in ticks(low, high):
        x, y = spot(value, value)
        parts.append(f'<path class="c-grid" d="M{x:.1f} {top}V{bottom}M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path class="c-diagonal" d="M{left} {bottom}L{right} {top}"/>')
    for i in chosen.tolist():
        x, y = spot(float(before[i]), float(after[i]))
        side = "c-up" if after[i] > before[i] else "c-down"
        parts.append(f'<circle class="{side}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="344" text-anchor="middle">IFD before</text>')
    level = (top + bottom) / 2
    parts.append(
        f'<text x="10" y="{level}" text-anchor="middle" transform="rotate(-90 10 {level})">'
        "IFD after</text>"
    )
    return _svg(416, 350, label, "".join(parts))


def curve(across: Numbers, up: Numbers, marked: float, label: str) -> Markup:
    """A line through points, with one place on the axis marked.

    Args:
        across: ascending, two or more.
        up: finite values.
        marked: where the mark stands.
        label: for screen readers.
    """
    left, right, top, bottom = 52.0, 314.0, 8.0, 104.0
    low, high = min(float(across[0]), marked), max(float(across[-1]), marked)
    floor, peak = float(up.min()), float(up.max())
    deep = (peak - floor) or 1.0
    digits = next((n for n in range(3, 7) if f"{peak:.{n}g}" != f"{floor:.{n}g}"), 3)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    spots = [
        f"{place(x):.1f} {bottom - (y - floor) / deep * (bottom - top):.1f}"
        for x, y in zip(across.tolist(), up.tolist(), strict=True)
    ]
    body = (
        f'<path class="c-line" d="M{"L".join(spots)}"/>'
        f'<path class="c-diagonal" d="M{place(marked):.1f} {top}V{bottom}"/>'
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{peak:.{digits}g}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end">{floor:.{digits}g}</text>'
    )
    return _svg(320, 126, label, body + _axis(low, high, left, right, bottom))


def point_map(points: Numbers, names: Sequence[str | None], label: str) -> Markup:
    """Points in a plane, a colour for each name; those without a name are rings.

    Args:
        points: [n, 2].
        names: of each point.
        label: for screen readers.
    """
    known = sorted({name for name in names if name is not None})
    hue = {name: round(360 * place / max(len(known), 1)) for place, name in enumerate(known)}
    low = points.min(axis=0)
    scale = 400 / max(float(np.ptp(points, axis=0).max()), 1e-12)
    spots = 10 + (points - low) * scale
    tall = int(spots[:, 1].max()) + 10
    parts = []
    for (x, y), name in zip(spots.tolist(), names, strict=True):
        at = f'cx="{x:.1f}" cy="{tall - y:.1f}"'
        if name is None:
            parts.append(f'<circle class="c-line" {at} r="3.4"/>')
        else:
            parts.append(
                f'<circle fill="hsl({hue[name]} 60% 50%)" fill-opacity=".6" {at} r="2.4"/>'
            )
    for place, name in enumerate(known):
        y = 16 + 17 * place
        parts.append(
            f'<circle fill="hsl({hue[name]} 60% 50%)" cx="432" cy="{y - 4}" r="4"/>'
            f'<text x="442" y="{y}">{escape(name)}</text>'
        )
    y = 16 + 17 * len(known)
    parts.append(
        f'<circle class="c-line" cx="432" cy="{y - 4}" r="3.4"/>'
        f'<text x="442" y="{y}">targets</text>'
    )
    return _svg(600, max(tall, y) + 10, label, "".join(parts), "map")


def flow(
    stops: Sequence[tuple[str, int]], leaving: Sequence[tuple[str, int]], label: str
) -> Markup:
    """A stream that narrows: what is there at every stop, and what leaves between two of them.

    Args:
        stops: titles and rows, two or more, not growing.
        leaving: titles and rows, one fewer than stops.
        label: for screen readers.
    """
    widest = max(max(rows for _, rows in stops), 1)
    tall, top, gap = 150.0, 46.0, 860.0 / max(len(stops) - 1, 1)
    parts = []
    for i, (title, rows) in enumerate(stops):
        x, deep = 20 + i * gap, rows / widest * tall
        if i < len(leaving):
            after = stops[i + 1][1] / widest * tall
            parts.append(
                f'<rect class="c-stream" x="{x:.1f}" y="{top}" width="{gap:.1f}" '
                f'height="{after:.1f}"/>'
            )
            parts.append(
                _leaving(x, gap, top + after, max(deep - after, 0.0), top + tall, leaving[i])
            )
        parts.append(
            f'<rect class="c-stop" x="{x - 3:.1f}" y="{top}" width="6" rx="2" '
            f'height="{max(deep, 1.5):.1f}"/>'
        )
        last = i == len(stops) - 1
        anchor, at = ("end", x + 3) if last else ("start", x - 3)
        parts.append(
            f'<text class="c-number" x="{at:.1f}" y="20" text-anchor="{anchor}">{rows:,}</text>'
            f'<text x="{at:.1f}" y="37" text-anchor="{anchor}">{escape(title)}</text>'
        )
    return _svg(900, int(top + tall + 74), label, "".join(parts))


def _leaving(
    x: float, gap: float, level: float, deep: float, floor: float, what: tuple[str, int]
) -> str:
    """A band that bends down out of the stream, with its title under it."""
    title, rows = what
    if not rows:
        return ""
    deep = max(deep, 1.0)
    thick = min(deep, gap * 0.42)
    inner, foot = x + gap * 0.2, floor + 26
    outer, under = inner + thick, level + deep
    # Circular where there is room: the band keeps its width around the bend.
    body = (
        f"M{x:.1f} {level:.1f}H{x + gap * 0.08:.1f}"
        f"C{outer - thick * 0.3:.1f} {level:.1f} {outer:.1f} {level + deep * 0.3:.1f} "
        f"{outer:.1f} {max(under, level + 40):.1f}V{foot:.1f}H{inner:.1f}"
        f"V{min(under + 14, foot):.1f}C{inner:.1f} {under + 4:.1f} {inner - gap * 0.04:.1f} "
        f"{under:.1f} {x + gap * 0.08:.1f} {under:.1f}H{x:.1f}Z"
    )
    end = (inner + outer) / 2
    return (
        f'<path class="c-leave" d="{body}"/>'
        f'<text class="c-small" x="{end:.1f}" y="{foot + 18:.1f}" text-anchor="middle">'
        f"{rows:,}</text>"
        f'<text x="{end:.1f}" y="{foot + 34:.1f}" text-anchor="middle">{escape(title)}</text>'
    )


def _shares(values: Values, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    shares: npt.NDArray[np.float64] = counts / max(len(values), 1)
    return shares


def _axis(low: float, high: float, left: float, right: float, level: float) -> str:
    parts = [f'<path class="c-axis" d="M{left} {level}H{right}"/>']
    for value in ticks(low, high):
        x = left + (value - low) / (high - low) * (right - left)
        x = min(max(x, left + 6), right - 6)
        parts.append(f'<text x="{x:.1f}" y="{level + 16}" text-anchor="middle">{value:g}</text>')
    return "".join(parts)


def _svg(width: int, height: int, label: str, body: str, kind: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{body}</svg>'
    )
