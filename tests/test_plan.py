"""`tamis plan`: rows as ingest counts them, time and tokens that a run then takes, and reuse.

The clock counts requests to engines, so that what a run takes is known.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from engine_fakes import CountedEngines
from rich.console import Console

from pipeline import identity, probe
from pipeline.backend import LocalBackend
from pipeline.config import read_config
from pipeline.plan import Plan, plan_of
from pipeline.probe import Meter, Probe
from pipeline.runner import Run
from pipeline.survey import surveyed
from stages.errors import ConfigError
from stages.storage import Store

ASKED = {
    "difficulty": "scorer",
    "embedding": "embedder",
    "features": "reader",
    "reflection": "generator",
}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> CountedEngines:
    """Fake engines whose requests take a second each, by the probe's clock."""
    made = CountedEngines()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return float(made.asked.total())

    monkeypatch.setattr(probe, "make_engine", made)
    monkeypatch.setattr(probe, "time", Clock)
    return made


def lines(plan: Plan) -> dict[str, str]:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(plan.table)
    return {line.split()[0]: line for line in captured.get().splitlines() if line.strip()}


def probed(recipe: Any, rows: int, tmp_path: Any) -> Probe:
    config = read_config(recipe.save())
    folder = Store(str(tmp_path / "survey"))
    survey = surveyed(
        config.sources, config.targets, config.ingest, config.contamination, folder,
        sample=rows, seed=config.seed,
    )  # fmt: skip
    done = Probe(config, survey, folder)
    done.run()
    return done


def requests_by_stage(recipe: Any) -> Counter[str]:
    """Requests that each stage makes in a run."""
    made, found = CountedEngines(), Counter[str]()
    before = 0

    def note(event: Any) -> None:
        nonlocal before
        if event.kind == "done":
            found[event.stage] = made.asked.total() - before
            before = made.asked.total()

    Run(read_config(recipe.save()), note, backend=LocalBackend(made)).execute()
    return found


@pytest.mark.parametrize("rows", [6, 12])
def test_a_run_takes_what_was_measured(
    recipe: Any, engines: CountedEngines, tmp_path: Any, rows: int
) -> None:
    recipe.value["reflection"]["limit"] = 7
    found = probed(recipe, rows, tmp_path).measured
    taken = requests_by_stage(recipe)
    assert set(found) == {
        "difficulty", "reflection", "dictionary", "prototypes", "features", "embedding"
    }  # fmt: skip
    for name, measured in found.items():
        assert not measured.why
        assert measured.work_s.low <= taken[name] * 1.05, name
        assert measured.work_s.high >= taken[name] * 0.95, name
        assert measured.work_s.high <= 2 * measured.work_s.low, name


def test_baselines_and_explanations_are_measured_too(
    recipe: Any, engines: CountedEngines, tmp_path: Any
) -> None:
    del recipe.value["difficulty"], recipe.value["reflection"]
    recipe.value |= {
        "baselines": {"scores": ["bm25", "embedding", "hidden"]},
        "valuation": {},
        "explanation": {"rows": 9},
    }
    found = probed(recipe, 6, tmp_path).measured
    taken = requests_by_stage(recipe)
    # Neither potentials nor valuation asks a model.
    assert set(found) == {
        "dictionary", "prototypes", "features", "embedding", "baseline_targets", "baselines",
        "explanation",
    }  # fmt: skip
    for name, measured in found.items():
        assert not measured.why
        assert measured.work_s.low <= taken[name] * 1.05, name
        assert measured.work_s.high >= taken[name] * 0.95, name


def test_stage_that_reads_what_was_not_measured_is_not_measured_either(
    recipe: Any, engines: CountedEngines
) -> None:
    questions = [
        {"messages": [{"role": "user", "content": f"What about plum {n}?"}]} for n in range(4)
    ]
    plums = recipe.path.parent / "plums.jsonl"
    plums.write_text("".join(json.dumps(one) + "\n" for one in questions))
    for section in ("difficulty", "reflection", "dictionary", "features", "mixture"):
        del recipe.value[section]
    recipe.value["selection"] = {}
    recipe.value["baselines"] = {"scores": ["hidden"], "part": "response"}
    notes = plan_of(read_config(recipe.save()), probe_rows=6).notes
    assert any("baseline_targets (can't be measured on a few rows: " in note for note in notes)
    assert "Not measured: baselines (reads what baseline_targets makes)." in notes


@pytest.mark.parametrize("begun", [False, True])
def test_loads_are_those_of_a_run(recipe: Any, begun: bool) -> None:
    recipe.value |= {
        "baselines": {"scores": ["embedding", "hidden"]},
        "valuation": {},
        "explanation": {"rows": 3},
    }
    made, found = CountedEngines(), Counter[str]()

    def note(event: Any) -> None:
        if event.kind == "done":
            found[event.stage] = len(made.opened) - found.total()

    if begun:
        for stage in ("ingest", "difficulty", "reflection", "dictionary", "prototypes"):
            backend = LocalBackend(CountedEngines())
            Run(read_config(recipe.save()), print, backend=backend).execute(stage)
    plan = lines(plan_of(read_config(recipe.save()), probe_rows=None))
    Run(read_config(recipe.save()), note, backend=LocalBackend(made)).execute()
    assert found.total() == len(made.opened) > 0
    for name, line in plan.items():
        loads = re.search(r"\((?:float32|bfloat16)\) +(\d+|shared)", line)
        planned = int(loads.group(1)) if loads and loads.group(1) != "shared" else 0
        assert planned == found[name], (name, line)
    assert ("shared" in plan["features"]) == (not begun)


def test_tokens_are_those_that_reach_the_models(
    recipe: Any, engines: CountedEngines, tmp_path: Any
) -> None:
    found = probed(recipe, 10, tmp_path).measured
    meter = Meter()
    by_stage: dict[str, Meter] = {}
    last = meter.copy()

    def note(event: Any) -> None:
        nonlocal last
        if event.kind == "done":
            by_stage[event.stage] = meter.since(last)
            last = meter.copy()

    backend = LocalBackend(meter.engine)
    Run(read_config(recipe.save()), note, backend=backend).execute()
    for name in ("difficulty", "reflection", "features", "prototypes", "dictionary"):
        assert found[name].read == pytest.approx(by_stage[name].read, rel=0.15), name
    # Every made-up reply is three tokens long.
    assert found["reflection"].written == pytest.approx(by_stage["reflection"].written, rel=0.15)
    assert found["difficulty"].written == 0


def test_plan_counts_rows_and_leaves_nothing(recipe: Any, engines: CountedEngines) -> None:
    recipe.value["reflection"] |= {"limit": 5, "where": "ifd < 2"}
    plan = plan_of(read_config(recipe.save()), probe_rows=6)
    by_stage = lines(plan)
    assert not recipe.run_folder.exists()
    assert re.match(r"ingest +23 ", by_stage["ingest"])
    assert re.match(r"difficulty +19 ", by_stage["difficulty"])
    assert re.match(r"reflection +≤ 5 ", by_stage["reflection"])
    assert re.match(r"features +23 ", by_stage["features"])
    assert re.match(r"selection +19 ", by_stage["selection"])
    assert all("to do" in by_stage[name] for name in ASKED)
    assert any("19 rows and 4 target rows of 23 records" in note for note in plan.notes)
    # Scorer, teacher, reader and encoder: each is still open where the next stage asks it.
    assert any("Models are loaded 4 times, read " in note for note in plan.notes)
    assert not any("Not measured" in note for note in plan.notes)


def test_what_is_complete_is_not_measured(
    recipe: Any, execute: Any, engines: CountedEngines
) -> None:
    execute()
    plan = plan_of(read_config(recipe.save()), probe_rows=6)
    assert all("complete (" in line for name, line in lines(plan).items() if name != "stage")
    assert engines.opened == []
    recipe.write_rows("pears", 0, 12)
    plan = plan_of(read_config(recipe.save()), probe_rows=6)
    assert any("sources changed" in note for note in plan.notes)
    # 19 of the 22 rows that there are now.
    assert "up to 19 rows' columns are there" in lines(plan)["difficulty"]


def test_what_is_fitted_once_is_not_planned_again_when_rows_come(
    recipe: Any, execute: Any, engines: CountedEngines
) -> None:
    """The plan says of every stage that is fitted what the run then does."""
    execute()
    for changed in ("rows", "targets"):
        if changed == "rows":
            recipe.write_rows("pears", 0, 14)
        else:
            recipe.write_rows("plums", 20, 26)
        by_stage = lines(plan_of(read_config(recipe.save()), probe_rows=None))
        done = execute()
        for name in ("ingest", "dictionary", "prototypes", "selection"):
            assert ("complete (" in by_stage[name]) == (done.kinds(name) == ["kept"]), name
        assert done.kinds("dictionary") == ["kept"]
        assert (done.kinds("prototypes") == ["kept"]) == (changed == "rows")


def test_a_model_whose_library_is_elsewhere_is_planned_and_not_measured(
    recipe: Any, engines: CountedEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "version", partial(_without, "vllm", identity.version))
    recipe.value["models"]["teacher"]["engine"] = "vllm"
    config = read_config(recipe.save())
    assert "reflection" in lines(plan_of(config, probe_rows=None))
    with pytest.raises(ConfigError, match="isn't installed here"):
        Run(config, lambda _: None)


def _without(absent: str, version: Callable[[str], str], library: str) -> str:
    if library.startswith(absent):
        raise PackageNotFoundError(library)
    return version(library)


def test_columns_of_another_run_are_counted(
    recipe: Any, execute: Any, engines: CountedEngines, tmp_path: Any
) -> None:
    recipe.value["difficulty"] = {"limit": 4}
    del recipe.value["reflection"]
    execute()
    first = recipe.value["execution"]["run"]
    recipe.value["execution"]["run"] = str(tmp_path / "second")
    recipe.value["difficulty"] = {}
    config = read_config(recipe.save())
    assert "are there" not in lines(plan_of(config, probe_rows=6))["difficulty"]
    by_stage = lines(plan_of(config, probe_rows=6, reuse=first))
    assert "up to 4 rows' columns are there" in by_stage["difficulty"]
    assert "up to 23 rows' columns are there" in by_stage["embedding"]


def test_endpoints_are_not_asked(recipe: Any, engines: CountedEngines) -> None:
    recipe.value["models"]["teacher"] = {
        "model": "m", "engine": "openai", "endpoint": {"base_url": "http://localhost:1/v1"},
    }  # fmt: skip
    plan = plan_of(read_config(recipe.save()), probe_rows=6)
    assert "Not measured: reflection (asks an endpoint)." in plan.notes
    assert engines.asked["generator"] == 0
    assert engines.asked["embedder"] > 0


def test_without_a_probe_no_model_is_loaded(recipe: Any, engines: CountedEngines) -> None:
    by_stage = lines(plan_of(read_config(recipe.save()), probe_rows=None))
    assert "3 files" in by_stage["ingest"]
    assert engines.opened == []
