"""Forecasts from small trainings on real rows: how far each form is off where it hasn't looked.

Runs `tamis pilot configs/pilot.yaml` (24 mixtures of GSM8K, Alpaca and code at 300 and 1,200 rows,
eight held out, six of those trained on 4,800 rows too), projects both ways, and trains the centre
of the design from further starts, to say how much of an error is the noise of a training.

    python benchmarks/pilots.py [--run FOLDER] [--json FILE] [--check]

An interrupted run goes on. `--check` exits 1 unless the recommended form errs at the budget at
most half as much as the constant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from pipeline.pilot.config import PilotConfig, read_pilot
from pipeline.pilot.runner import run_pilots
from pipeline.pilot.trials import Trial, TrialJob, run_trial

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "pilot.yaml"
STARTS = 4


def noise(config: PilotConfig) -> dict[str, Any]:
    """Standard deviation of the loss over starts, at the design's centre, by rows."""
    sources = tuple(source.name for source in config.sources)
    centre = tuple(1 / len(sources) for _ in sources)
    spread = {}
    for rows in config.design.scales:
        jobs = [
            TrialJob(
                config.execution.run, Trial(centre, rows, start), sources,
                config.proxy, config.training, config.student, config.seed,
            )
            for start in range(STARTS)
        ]  # fmt: skip
        spread[str(rows)] = float(np.std([run_trial(job)["loss"] for job in jobs], ddof=1))
    return {"starts": STARTS, "standard_deviation": spread}


def table(report: dict[str, Any]) -> str:
    """Mean absolute errors in nats per token, as Markdown."""
    small, large = report["projection"]["scales"]
    head = [
        "form", f"left out, {small:,}", f"left out, {large:,}", f"held out, {small:,}",
        f"held out, {large:,}", f"held out, {report['projection']['budget']:,}", "bias there",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for row in report["forms"]:
        numbers = [*row["left_out_error"], *row["held_out_error"], row["budget_error"]]
        cells = [row["form"], *(f"{n:.4f}" for n in numbers), f"{row['budget_bias']:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    alone = report["projection_alone"]
    lines.append(
        f"| measured losses, projected | | | | | {alone['budget_error']:.4f} "
        f"| {alone['budget_bias']:+.4f} |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/pilot")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    reports = {}
    for of in ("log_loss", "loss"):
        changes = [f"execution.run={given.run}", f"forecast.project={of}"]
        config = read_pilot(str(RECIPE), changes)
        reports[of] = run_pilots(config, print, lambda progress: None)
        told = reports[of]["recommended"]
        print(f"\nprojected: {of}\n\n{table(reports[of])}\n\nrecommended: {json.dumps(told)}")
        print(f"AutoScale: {json.dumps(reports[of]['autoscale'])}")
    report = reports["log_loss"]
    print(f"\nSpearman with the loss, by scale: {json.dumps(report['rank_correlation'])}")
    spread = noise(config)
    print(f"noise of a training: {json.dumps(spread)}")
    if given.json:
        result = {
            "recipe": config.portable_recipe,
            "machine": {"python": platform.python_version(), "cpus": os.cpu_count()},
            "noise": spread,
            "reports": reports,
        }
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    by_form = {row["form"]: row["budget_error"] for row in report["forms"]}
    best = by_form[report["recommended"]["form"]]
    return int(given.check and best > by_form["constant"] / 2)


if __name__ == "__main__":
    sys.exit(main())
