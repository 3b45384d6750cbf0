"""`tamis analyse` on run directories written as the runner writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from click.testing import Result
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.rundir import finish_stage, start_stage
from stages.rows import OK, ROWS, status_field
from stages.storage import Store

PASS_RATE = pa.schema(
    [
        ("rollouts", pa.int32()),
        ("correct", pa.int32()),
        ("truncated", pa.int32()),
        ("rollout_tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("pass_rate", pa.float32()),
        status_field("pass_rate"),
    ]
)
REASONING = pa.schema(
    [
        ("reasoning_characters", pa.int32()),
        ("reasoning_steps", pa.int32()),
        ("review_ratio", pa.float32()),
        ("failed_step_fraction", pa.float32()),
        status_field("reasoning"),
    ]
)

Row = Mapping[str, Any]


def write_run(
    url: str, rows: Sequence[Row], stage: str, adds: pa.Schema, model: str = "", shard: int = 7
) -> str:
    """A run of ingest and one row stage; every row has an id and the stage's columns."""
    run = Store(url)
    ingest = [
        {"group": row["id"], "source": "maths", **row, "messages": [], "file": "f", "record": 0}
        for row in rows
    ]
    values = [{f"{stage}_status": OK, **row} for row in rows]
    tables = {
        "ingest": pa.Table.from_pylist([{n: r.get(n) for n in ROWS.names} for r in ingest], ROWS),
        stage: pa.Table.from_pylist(
            [{n: row.get(n) for n in ("id", *adds.names)} for row in values],
            pa.schema([pa.field("id", pa.string()), *adds]),
        ),
    }
    for name, table in tables.items():
        start_stage(run, name, {"stage": name})
        files = {}
        for number, start in enumerate(range(0, len(rows), shard)):
            part = f"part-{number:05d}.parquet"
            run.write_table(f"{name}/{part}", table.slice(start, shard))
            files[part] = table.slice(start, shard).num_rows
        finish_stage(run, name, list(files), files, rows=len(rows), models={"model": model})
    return url


def rated(row: str, correct: int, rollouts: int = 10, **others: Any) -> dict[str, Any]:
    return {
        "id": row,
        "rollouts": rollouts,
        "correct": correct,
        "truncated": 0,
        "rollout_tokens": 100,
        "prompt_tokens": 10,
        "pass_rate": correct / rollouts,
        **others,
    }


def pass_rates(url: Path | str, rows: Sequence[Row], model: str, shard: int = 7) -> str:
    return write_run(str(url), rows, "pass_rate", PASS_RATE, model, shard)


def analyse(*arguments: str, width: int = 200) -> Result:
    return CliRunner().invoke(
        app, ["analyse", *arguments], env={"COLUMNS": str(width)}, catch_exceptions=False
    )


def printed(*arguments: str) -> str:
    done = analyse(*arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture
def ladder(tmp_path: Path) -> list[str]:
    """Two models over 12 easy rows, 11 hard ones, an unsolved one, and one that fits no group."""
    names = {
        **{f"e{i:02d}": (8, 10) for i in range(12)},
        **{f"h{i:02d}": (1, 5) for i in range(11)},
        "u00": (0, 0),
        "x00": (9, 1),
    }
    weak = [rated(i, a, source="[b]code" if i < "e03" else "maths") for i, (a, _) in names.items()]
    strong = [
        rated(i, b, source="[b]code" if i < "e03" else "maths") for i, (_, b) in names.items()
    ]
    # Rows that only one run, or none, has a rate of.
    weak += [rated("y00", 5), {"id": "z00"}]
    strong += [{"id": "y00"}, {"id": "z00"}]
    return [
        pass_rates(tmp_path / "weak", weak, "org/small@main"),
        # Other shards and another order: rows are matched by id.
        pass_rates(tmp_path / "strong", strong[::-1], "package://kit/large.gguf", shard=5),
    ]


class TestGroups:
    def test_rows_are_grouped_over_both_runs(self, ladder: list[str], tmp_path: Path) -> None:
        files = ["--out", f"{tmp_path}/new/groups.parquet", "--json", f"{tmp_path}/groups.json"]
        shown = printed("groups", *ladder, *files)
        found = {row["id"]: row["difficulty_group"] for row in pq.read_table(files[1]).to_pylist()}
        assert found == {
            **{f"e{i:02d}": 0 for i in range(12)},
            **{f"h{i:02d}": 1 for i in range(11)},
            "x00": -1,
            "u00": -2,
        }
        report = json.loads((tmp_path / "groups.json").read_text())
        assert [group["group"] for group in report["groups"]] == [0, 1, "outliers", "unsolved"]
        assert [group["rows"] for group in report["groups"]] == [12, 11, 1, 1]
        assert report["groups"][0]["pass_rates"] == pytest.approx([0.8, 1.0])
        assert report["groups"][1]["pass_rates"] == pytest.approx([0.1, 0.5])
        assert report["groups"][0]["sources"] == {"[b]code": 3, "maths": 9}
        assert report["groups"][3]["share"] == pytest.approx(1 / 25)
        assert report["left_out"] == {"pass_rate_in_some_runs": 1, "in_none": 1}
        assert [m["model"] for m in report["models"]] == [
            "org/small@main", "package://kit/large.gguf"
        ]  # fmt: skip
        lines = [line.split() for line in shown.splitlines()]
        assert lines[0][:6] == ["group", "rows", "share", "small@main", "large.gguf", "curve"]
        assert lines[1][:6] == ["0", "12", "48.0%", "0.800", "1.000", "▇█"]
        assert " ".join(lines[1][6:]) == "[b]code 3, maths 9"
        assert lines[2][:6] == ["1", "11", "44.0%", "0.100", "0.500", "▁▅"]
        assert "left out: with a pass rate in some runs only 1, in none 1" in shown

    def test_options_reach_the_method(self, ladder: list[str], tmp_path: Path) -> None:
        out = f"{tmp_path}/groups.parquet"
        printed("groups", *ladder, "--min-size", "12", "--out", out)
        labels = pq.read_table(out)["difficulty_group"].to_pylist()
        assert sorted(set(labels)) == [-2, -1, 0]
        printed("groups", *ladder, "--min-size", "1", "--out", out)
        assert -1 not in pq.read_table(out)["difficulty_group"].to_pylist()

    def test_one_model_in_two_runs_is_told_apart(self, tmp_path: Path) -> None:
        rows = [rated("a", 5), rated("b", 6)]
        first, second = (pass_rates(tmp_path / name, rows, "org/m") for name in ("one", "two"))
        head = printed("groups", first, second).splitlines()[0]
        assert "m (one)" in head
        assert "m (two)" in head
        third = pass_rates(tmp_path / "else" / "one", rows, "org/m")
        wide = analyse("groups", first, third, width=500).stdout.splitlines()[0]
        assert f"m ({first})" in wide
        assert f"m ({third})" in wide

    def test_no_row_solved(self, tmp_path: Path) -> None:
        run = pass_rates(tmp_path / "run", [rated("a", 0), rated("b", 0)], "m")
        shown = printed("groups", run)
        assert "unsolved" in shown
        assert "radius" not in shown

    def test_runs_in_memory(self) -> None:
        run = pass_rates("memory://analyse/run", [rated("a", 5)], "m")
        printed("groups", run, "--out", "memory://analyse/groups.parquet")
        assert Store("memory://analyse").read_table("groups.parquet")["id"].to_pylist() == ["a"]


class TestCost:
    rows = (
        # 4 * 10 + 40 = 80 tokens for 2 correct solutions; 160 for 1 and 2 rollouts cut off.
        rated("a", 2, 4, rollout_tokens=40, prompt_tokens=10),
        rated("b", 1, 4, rollout_tokens=80, prompt_tokens=20, truncated=2, pass_rate=0.5),
        rated("c", 0, 4, rollout_tokens=120, prompt_tokens=30, source="proofs", truncated=4,
              pass_rate=None),
        {"id": "d"},
    )  # fmt: skip

    def costs(self, tmp_path: Path, *options: str) -> dict[str | None, Any]:
        run = pass_rates(tmp_path / "run", self.rows, "org/model@v1", shard=2)
        out = tmp_path / "cost.json"
        printed("cost", run, *options, "--json", str(out))
        report = json.loads(out.read_text())
        return {"currency": report["currency"], **{c["source"]: c for c in report["costs"]}}

    def test_tokens_by_hand(self, tmp_path: Path) -> None:
        found = self.costs(tmp_path)
        assert found["maths"]["rows"] == 2
        assert found["maths"]["tokens"]["one_correct_solution"] == pytest.approx(240 / 3)
        # Truncated rollouts were paid for, so b costs 160 and not 160 / 2.
        assert found["maths"]["tokens"]["median_of_solved_rows"] == pytest.approx((40 + 160) / 2)
        assert found["maths"]["never_solved"] == 0
        assert found["maths"]["truncated"] == pytest.approx(2 / 8)
        assert found["proofs"]["tokens"] == {
            "one_correct_solution": None, "median_of_solved_rows": None
        }  # fmt: skip
        assert found["proofs"]["never_solved"] == 1
        # What was paid for rows that were never solved is part of the whole.
        assert found[None]["tokens"]["one_correct_solution"] == pytest.approx((240 + 240) / 3)
        assert found[None]["never_solved"] == pytest.approx(1 / 3)
        assert (found["currency"], found[None]["money"]) == (None, None)

    def test_money_by_hand(self, tmp_path: Path) -> None:
        prices = tmp_path / "prices.yaml"
        prices.write_text(
            "currency: EUR\nper_million_tokens:\n  org/model@v1: {input: 1, output: 3}\n"
        )
        found = self.costs(tmp_path, "--prices", str(prices))
        assert found["currency"] == "EUR"
        # 120 tokens in and 120 out for 3 solutions; a: (40 + 120) / 2, b: 80 + 240.
        assert found["maths"]["money"]["one_correct_solution"] == pytest.approx(160e-6)
        assert found["maths"]["money"]["median_of_solved_rows"] == pytest.approx(200e-6)
        shown = printed("cost", str(tmp_path / "run"), "--prices", str(prices))
        assert "EUR a solution" in shown
        cells = {line.split()[1]: line.split() for line in shown.splitlines()[1:]}
        assert cells["proofs"][2:] == ["1", "100.0%", "100.0%", "∞", "–", "∞", "–"]

    def test_price_lists_that_dont_fit(self, tmp_path: Path) -> None:
        run = pass_rates(tmp_path / "run", self.rows, "org/model@v1")
        prices = tmp_path / "prices.yaml"
        for text, expected in (
            (None, "no price list at"),
            ("a: [", "is no YAML"),
            ("", "a price list has `currency`"),
            ("currency: EUR\nper_million_tokens: {m: {input: 1}}", "per_million_tokens.m.output"),
            ("currency: EUR\nper_million_tokens: {m: {input: -1, output: 1}}", "m.input"),
            ("currency: EUR\nper_million_tokens: {m: {input: 1, output: 1}}",
             "no price for org/model@v1"),
        ):  # fmt: skip
            if text is not None:
                prices.write_text(text)
            done = analyse("cost", run, "--prices", str(prices))
            assert done.exit_code == 2, text
            assert expected in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1


class TestReasoning:
    def test_distributions_and_scores_within_prompts(self, tmp_path: Path) -> None:
        pytest.importorskip("stages.reasoning.zscores")
        lengths = [100, 200, 600, 400, 500]
        rows: list[dict[str, Any]] = [
            {
                "id": f"r{i}",
                "group": "p" if i < 3 else f"q{i}",
                "source": "maths",
                "reasoning_characters": length,
                "reasoning_steps": 3 + i,
                "review_ratio": 0.25,
                "failed_step_fraction": i / 8,
            }
            for i, length in enumerate(lengths)
        ]
        rows.append({"id": "r5", "group": "p", "source": "web", "reasoning_characters": 12})
        run = write_run(str(tmp_path / "run"), rows, "reasoning", REASONING, shard=4)
        out, report = tmp_path / "z.parquet", tmp_path / "reasoning.json"
        shown = printed("reasoning", run, "--out", str(out), "--json", str(report))
        found = pq.read_table(out)
        assert found["id"].to_pylist() == [row["id"] for row in rows]
        z = found["reasoning_characters_z"].to_pylist()
        expected = scipy.stats.zscore([100, 200, 600, 12])
        assert [*z[:3], z[5]] == pytest.approx(expected.tolist(), rel=1e-5)
        assert z[3:5] == [None, None]
        assert found["review_ratio_z"].to_pylist() == [None] * 6
        assert found["failed_step_fraction_z"].to_pylist()[3:] == [None] * 3
        entries = {
            (entry["source"], entry["measure"]): entry
            for entry in json.loads(report.read_text())["distributions"]
        }
        length = entries["maths", "reasoning_characters"]
        assert (length["rows"], length["lower_quartile"], length["median"]) == (5, 200, 400)
        assert length["upper_quartile"] == 500
        assert entries["web", "review_ratio"]["rows"] == 0
        assert entries["web", "review_ratio"]["median"] is None
        assert "several responses that differ): 1" in shown


class TestErrors:
    def test_one_line_and_status_2(self, ladder: list[str], tmp_path: Path) -> None:
        other = pass_rates(tmp_path / "other", [rated("other", 3)], "m")
        unpaid = pass_rates(tmp_path / "unpaid", [{"id": "a"}], "m")
        begun = pass_rates(tmp_path / "begun", [rated("a", 3)], "m")
        start_stage(Store(begun), "pass_rate", {"stage": "pass_rate"})
        for arguments, expected in (
            (["groups", str(tmp_path)], "is no run directory"),
            (["groups", begun], "has no complete stage pass_rate"),
            (["reasoning", begun], "has no complete stage reasoning"),
            (["groups", ladder[0], other], "no row has a pass rate in all"),
            (["groups", ladder[0], ladder[0]], "named twice"),
            (["groups", *ladder, "--out", str(tmp_path)], "is a folder"),
            (["cost", *ladder, "--json", f"{ladder[0]}/recipe/"], "is a folder"),
            (["cost", *ladder, "--json", f"{ladder[0]}/ingest/manifest.json/x.json"],
             "cannot write"),
            (["cost", unpaid], "no row has a rollout"),
        ):  # fmt: skip
            done = analyse(*arguments)
            assert done.exit_code == 2, (arguments, done.stderr)
            assert expected in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1

    def test_pass_rates_of_an_earlier_ingest(self, ladder: list[str]) -> None:
        run = Store(ladder[0])
        last = [name for name in run.names("ingest") if name.startswith("part-")][-1]
        run.remove(f"ingest/{last}")
        done = analyse("cost", *ladder)
        assert done.exit_code == 1
        assert "run the recipe again" in done.stderr
