"""Rules that the repository keeps: import direction, light imports, no shadowing of Airflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"airflow", "ray", "torch", "transformers", "vllm", "sentence_transformers", "datasets"}


def test_airflow_folder_is_not_a_package() -> None:
    assert not (ROOT / "airflow" / "__init__.py").exists()
    assert not (ROOT / "tests" / "airflow").exists()


def test_airflows_side_imports_none_of_ours() -> None:
    ours = {"pipeline", "stages", "ray", "torch", "pyarrow"}
    for file in (ROOT / "airflow").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not ours & {name.split(".")[0] for name in names}, file


@pytest.mark.parametrize(
    "modules", ["pipeline, stages", "pipeline.cli", "pipeline.flow", "stages.difficulty"]
)
def test_importing_loads_no_model_library(modules: str) -> None:
    code = f"import {modules}, sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_stages_never_import_the_application() -> None:
    offenders = []
    for file in (ROOT / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "pipeline" for name in names):
                offenders.append(str(file))
    assert not offenders


def test_tests_see_the_checkout() -> None:
    import pipeline
    import stages

    assert Path(str(pipeline.__file__)).parent.parent == ROOT
    assert Path(str(stages.__file__)).parent.parent == ROOT


def test_shipped_recipes_are_valid_and_fit_their_flow() -> None:
    from pipeline.config import read_config
    from pipeline.flow import flow_of

    recipes = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "tests/recipes").glob("*.yaml")])
    others = [one for one in recipes if one.stem.startswith(("pilot", "synthesis", "train-sae"))]
    assert len(recipes) - len(others) >= 4
    for recipe in recipes:
        if recipe not in others:
            names = flow_of(read_config(str(recipe))).names
            assert {"ingest", "difficulty", "selection", "emission"} <= set(names)
