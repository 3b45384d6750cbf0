"""The command as a user meets it: exit status, one line of error, Ctrl-C, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]


def tamis(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )


def test_wrong_configs_exit_2_with_one_line(recipe: Any, tmp_path: Path) -> None:
    recipe.value["selection"]["shares"] = 1
    recipe.save()
    half = tmp_path / "half.jsonl"
    half.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "ans\n')
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        (["run", str(recipe.path)], "did you mean 'share'?"),
        (["run", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["run", "configs/quickstart.yaml", "--set", "sources.0.path=gone.jsonl"], "gone.jsonl"),
        (["plan", "configs/quickstart.yaml", "--set", f"sources.0.path={tmp_path}/empty"],
         "holds no data file"),
        (["plan", "configs/quickstart.yaml", "--set", "models.student.model=/gone"],
         "no such file or folder"),
        (["stage", "ingest", "configs/quickstart.yaml", "--set", f"execution.run={half}/run"],
         "half.jsonl/run can't be written"),
        (["stage", "polish", "configs/quickstart.yaml"], "no stage 'polish'"),
        (["status", str(tmp_path)], "is no run directory"),
        (["why", str(tmp_path), "abc"], "is no run directory"),
    ):  # fmt: skip
        done = tamis(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_half_a_line_and_wrong_types_end_up_in_the_rejects(recipe: Any, tmp_path: Path) -> None:
    good = '{{"question": "What about {i}?", "answer": "It is {i}."}}\n'
    (tmp_path / "apples.jsonl").write_text(
        "".join(good.format(i=i) for i in range(20))
        + '{"question": "c", "ans\n'
        + '{"question": 7, "answer": ["x"]}\n'
    )
    done = tamis("stage", "ingest", recipe.save())
    assert done.returncode == 0, done.stderr
    rejects = pq.read_table(recipe.run_folder / "ingest" / "rejects" / "part-00000.parquet")
    assert [reason.split(":")[0] for reason in rejects["reason"].to_pylist()] == [
        "unparsable", "wrong_type"
    ]  # fmt: skip
    (tmp_path / "pears.jsonl").write_text('{"question": 7}\n' * 9)
    done = tamis("stage", "ingest", recipe.save())
    assert done.returncode == 1
    assert "pears" in done.stderr
    assert "max_reject_rate" in done.stderr


def test_ctrl_c_exits_130_and_the_next_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "pipeline", "run", "tests/recipes/tiny.yaml", "-v",
        "--set", f"execution.run={run}", "--set", f"execution.cache={tmp_path}/cache",
        "--set", "execution.shards_in_flight=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("difficulty: 1/3"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "goes on from here" in rest
    assert "Traceback" not in rest
    first = (run / "difficulty" / "part-00000.parquet").stat().st_mtime_ns
    again = tamis("stage", "difficulty", *command[4:])
    assert again.returncode == 0, again.stderr
    assert "1 already there" in again.stderr
    assert (run / "difficulty" / "part-00000.parquet").stat().st_mtime_ns == first


def test_plan_as_json_names_the_run_and_its_stages_in_its_last_line(recipe: Any) -> None:
    done = tamis("plan", recipe.save(), "--json", "--no-probe")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["run"] == str(recipe.run_folder)
    assert said["stages"][:3] == ["ingest", "difficulty", "reflection"]


def test_stage_as_json_says_what_was_done_in_its_last_line(recipe: Any) -> None:
    states = []
    for _ in range(2):
        done = tamis("stage", "ingest", recipe.save(), "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        manifest = json.loads(Path(said["manifest"]).read_text())
        assert said["rows"] == manifest["rows"] == 19
        assert said["digest"] == manifest["digest"]
        assert [one["stage"] for one in said["done"]] == ["ingest"]
        states.append(said["done"][0]["state"])
    assert states == ["computed", "nothing to do"]


def test_debug_shows_the_traceback() -> None:
    done = tamis("run", "nowhere.yaml", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize(
    "command",
    ["run", "plan", "stage", "status", "verify", "why", "report", "push", "submit", "job"],
)
def test_every_command_has_help(command: str) -> None:
    done = tamis(command, "--help")
    assert done.returncode == 0
    assert command in done.stdout
