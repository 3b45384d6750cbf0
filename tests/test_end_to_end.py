"""The quickstart, with fewer rows rewritten: every stage, real models, Ray; and its data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "configs/quickstart.yaml",
         "--set", "reflection.limit=12",
         "--set", f"execution.run={folder}/run", "--set", f"execution.cache={folder}/cache"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{folder}/run/dataset" in done.stdout
    return folder / "run"


def manifest(run: Path, stage: str) -> Any:
    return json.loads((run / stage / "manifest.json").read_text())


def test_rows_in_are_rows_kept_and_rejected(run: Path) -> None:
    sources = manifest(run, "ingest")["report"]["sources"]
    assert {name: (found["in"], found["kept"]) for name, found in sources.items()} == {
        "arithmetic": (34, 32),
        "python": (35, 32),
        "facts": (32, 30),
        "writing": (32, 30),
    }
    rejected = sum((Counter(found["rejected"]) for found in sources.values()), Counter())
    assert rejected == {
        "duplicate": 3, "unparsable": 1, "empty_turn": 2, "wrong_type": 1,
        "no_assistant_turn": 1, "bad_label": 1,
    }  # fmt: skip


def test_data_set_opens_with_load_dataset(run: Path, tmp_path: Path) -> None:
    code = (
        "import datasets, json, sys; "
        "d = datasets.load_dataset(sys.argv[1], split='train'); "
        "print(json.dumps([len(d), d.column_names, d[0]['messages'][-1]['role']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run / "dataset")],
        capture_output=True, text=True, check=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    rows, columns, role = json.loads(done.stdout.splitlines()[-1])
    assert rows == 48
    assert {"id", "source", "messages"} <= set(columns)
    assert role == "assistant"


def test_something_was_rewritten_and_only_by_the_students_verdict(run: Path) -> None:
    import pyarrow.parquet as pq

    files = sorted((run / "reflection").glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    asked = [row for row in rows if row["reflection_status"] != "not_requested"]
    assert len(asked) == 12
    rewritten = [row for row in asked if row["messages_reflected"]]
    assert rewritten
    for row in rewritten:
        assert row["reflection_outcome"] in ("both", "instruction", "response")
        if row["reflection_outcome"] == "response":
            assert row["reverse_loss_response"] < row["reverse_loss_before"]
    for row in asked:
        if row["reflection_outcome"] in ("none", "failed"):
            assert row["messages_reflected"] is None


def test_mixture_is_certified_and_emission_follows_it(run: Path) -> None:
    mixture = manifest(run, "mixture")["report"]
    emission = manifest(run, "dataset")["report"]
    assert sum(mixture["weights"].values()) == pytest.approx(1)
    assert mixture["lower_bound"] <= mixture["upper_estimate"] * (1 + 1e-9)
    assert mixture["certified"] == (mixture["gap"] <= mixture["tolerance"])
    rows = {name: found["rows"] for name, found in emission["sources"].items()}
    assert sum(rows.values()) == 48
    for name, weight in mixture["weights"].items():
        assert abs(rows.get(name, 0) - 48 * weight) <= 1
    assert emission["value_emitted"] > 0


def test_targets_of_two_tasks_draw_their_kind(run: Path) -> None:
    """The targets are arithmetic and Python: writing and facts should not lead the mixture."""
    weights = manifest(run, "mixture")["report"]["weights"]
    assert weights["arithmetic"] + weights["python"] > weights.get("facts", 0) + weights.get(
        "writing", 0
    )


def test_run_verifies_and_explains_itself(run: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.verify import verified_files
    from pipeline.why import story

    parts = {file for file in run.rglob("*.parquet") if "scratch" not in file.parts}
    assert verified_files(str(run)) >= len(parts) > 0
    row = pq.read_table(run / "dataset" / "data" / "train-00000-of-00001.parquet")["id"][0].as_py()
    assert "emission" in story(str(run), row)
    page = (run / "dataset" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    card = (run / "dataset" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "cc0-1.0" in card
