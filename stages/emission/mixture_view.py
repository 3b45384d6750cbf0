"""The mixture's charts: the bound against each weight, and a map of sources and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from stages.emission.plots import curve, point_map
from stages.storage import Store


def mixture_charts(mixture: Mapping[str, Any] | None, store: Store) -> list[tuple[str, Markup]]:
    """Titles and charts of what the mixture stage left to draw; none where there was none.

    Args:
        mixture: its report.
        store: its folder.
    """
    if mixture is None:
        return []
    charts: list[tuple[str, Markup]] = []
    if store.exists("curves.parquet"):
        table = store.read_table("curves.parquet")
        names = np.array(table["source"].to_pylist())
        weights, bounds = (table[name].to_numpy() for name in ("weight", "bound"))
        for name in dict.fromkeys(names.tolist()):
            mine = names == name
            chosen = mixture["weights"].get(name)
            label = f"least transport against the weight of {name}"
            if chosen is not None:
                charts.append((name, curve(weights[mine], bounds[mine], chosen, label)))
    if store.exists("map.parquet"):
        table = store.read_table("map.parquet")
        points = np.column_stack([table["x"].to_numpy(), table["y"].to_numpy()])
        label = "rows of each source and targets on two principal directions"
        charts.append(
            ("Sources and targets", point_map(points, table["source"].to_pylist(), label))
        )
    return charts
