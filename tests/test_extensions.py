"""Row stages of other packages: found by their entry point, run, resumed and named like our own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

import stages as st
from pipeline.config import read_config
from pipeline.flow import flow_of
from pipeline.status import status_table
from pipeline.verify import verified_files
from pipeline.why import story
from stages.errors import ConfigError

STAGE = """
import pyarrow as pa
from pydantic import Field

from stages.base import Columns, RowSettings
from stages.rows import status_field


class Settings(RowSettings):
    longest: int = Field(ge=1)


class BrevityStage:
    name = "brevity"
    version = 1
    on_targets = False
    Settings = Settings

    def __init__(self, settings, models, seed):
        self.settings = settings

    def columns(self):
        return Columns(
            ("id", "effective_messages"),
            pa.schema([("is_brief", pa.bool_()), status_field("brevity")]),
        )

    def engines(self):
        return {}

    def artifacts(self):
        return ()

    async def process(self, rows, engines, artifacts):
        longest = self.settings.longest
        texts = [turns[-1]["content"] for turns in rows["effective_messages"].to_pylist()]
        brief = [len(text) <= longest for text in texts]
        return pa.table(
            {"is_brief": brief, "brevity_status": ["ok"] * len(brief)},
        ).cast(self.columns().adds)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package with an entry point, as pip leaves it on the path."""

    def done(package: str = "brevity_package", code: str = STAGE, name: str = "brevity") -> None:
        site = tmp_path / package
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        point = f"[tamis.stages]\n{name} = {package}:BrevityStage\n"
        (info / "entry_points.txt").write_text(point)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return done


def test_it_runs_between_embedding_and_selection(
    recipe: Any, execute: Any, install: Callable[..., None]
) -> None:
    install()
    recipe.value["stages"] = {"brevity": {"longest": 18}}
    recipe.value["selection"]["filters"] = [{"rule": "is_brief == True", "reason": "long"}]
    del recipe.value["reflection"]
    done = execute()
    names = list(dict.fromkeys(event.stage for event in done.events))
    assert names.index("embedding") < names.index("brevity") < names.index("selection")
    run = recipe.run_folder
    rows = pq.read_table(sorted((run / "ingest").glob("part-*"))).sort_by("id").to_pylist()
    found = pq.read_table(sorted((run / "brevity").glob("part-*"))).sort_by("id").to_pylist()
    brief = {row["id"] for row in rows if len(row["messages"][-1]["content"]) <= 18}
    assert 0 < len(brief) < len(rows)
    assert {row["id"] for row in found if row["is_brief"]} == brief
    decisions = pq.read_table(run / "selection" / "decisions.parquet").to_pylist()
    assert {row["id"] for row in decisions if row["reason"] == "filter: long"} == (
        {row["id"] for row in rows} - brief
    )
    assert execute().kinds("brevity") == ["kept"]
    url = str(run)
    assert "brevity" in status_table(url).columns[0]._cells
    assert "is_brief" in story(url, rows[0]["id"])
    (run / "brevity" / "part-00000.parquet").write_bytes(b"")
    with pytest.raises(Exception, match=r"brevity/part-00000\.parquet has changed"):
        verified_files(url)


def test_a_changed_setting_computes_it_alone(
    recipe: Any, execute: Any, install: Callable[..., None]
) -> None:
    install()
    recipe.value["stages"] = {"brevity": {"longest": 18, "limit": 5}}
    execute()
    recipe.value["stages"]["brevity"]["longest"] = 19
    with pytest.raises(ConfigError, match=r"brevity\.settings\.longest: 18 → 19"):
        execute()
    done = execute(restart_from="brevity")
    assert done.kinds("embedding") == ["kept"]
    manifest = json.loads((recipe.run_folder / "brevity" / "manifest.json").read_text())
    assert (manifest["rows_computed"], manifest["counts"]["not_requested"]) == (5, 14)


def test_mistakes_are_named(recipe: Any, install: Callable[..., None]) -> None:
    install()

    def refused(stages: dict[str, Any], message: str) -> None:
        recipe.value["stages"] = stages
        with pytest.raises(ConfigError, match=message):
            flow_of(read_config(recipe.save()))

    refused({"brevty": {}}, r"stages\.brevty: no installed package.*offered: brevity")
    refused({"brevity": {}}, r"stages\.brevity can't be used: longest: missing")
    refused({"brevity": {"longst": 3}}, "did you mean 'longest'?")
    refused({"brevity": {"longest": 3, "where": "absent < 1"}}, "column 'absent'")
    refused({"Brevity": {"longest": 3}}, "stages.Brevity")
    install("other_package", STAGE)
    refused({"brevity": {"longest": 3}}, "is offered by brevity_package.*other_package")


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("import nowhere_at_all\n", "brevity", "can't be imported: No module"),
        (STAGE.replace('"is_brief"', '"ifd"'), "brevity", "adds the column 'ifd'"),
        (STAGE.replace('status_field("brevity")', '("x", pa.int8())'), "brevity",
         "no column brevity_status"),
        (STAGE, "short", "calls itself 'brevity'"),
        (STAGE.replace('name = "brevity"', 'name = "mixture"').replace(
            'status_field("brevity")', 'status_field("mixture")'), "mixture", "tamis' own"),
    ],
)  # fmt: skip
def test_stages_that_break_the_contract_are_refused(
    recipe: Any, install: Callable[..., None], code: str, name: str, message: str
) -> None:
    install(code=code, name=name)
    recipe.value["stages"] = {name: {"longest": 3}}
    with pytest.raises(ConfigError, match=message):
        flow_of(read_config(recipe.save()))


def test_a_session_runs_it_too(install: Callable[..., None], rows_of: Any) -> None:
    install()
    with st.Session(progress=False) as session:
        rows = session.ingest({"apples": rows_of("apples", 0, 6)}).rows
        rows = session.extension(rows, "brevity", longest=18)
        dataset = session.emission(session.selection(rows))
        with pytest.raises(ConfigError, match="did you mean 'longest'"):
            session.extension(rows, "brevity", longst=18)
    said = yaml.safe_load(dataset.files["recipe.yaml"])
    assert said["stages"] == {"brevity": {"where": None, "limit": None, "longest": 18}}
    expected = [len(row["messages"][-1]["content"]) <= 18 for row in rows]
    assert [row["is_brief"] for row in rows] == expected


def test_recipes_without_any_are_as_before(recipe: Any) -> None:
    assert "stages" not in read_config(recipe.save()).recipe


def test_looking_for_stages_loads_no_model_library() -> None:
    code = "import stages.extensions, sys; print(*{'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
