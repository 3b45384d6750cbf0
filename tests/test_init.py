"""`tamis init`: what it writes is a recipe that runs, true of the files and of the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from engine_fakes import CountedEngines
from test_schema import check
from typer.testing import CliRunner

from pipeline.backend import LocalBackend
from pipeline.cli import app
from pipeline.config import Config, read_config
from pipeline.init import models
from pipeline.init.machine import Machine
from pipeline.init.models import CHAT_MODELS, proposed_student, proposed_teacher
from pipeline.init.recipe import Choices, recipe_text
from pipeline.runner import Run
from stages.errors import ConfigError
from stages.ingest import content_of
from stages.storage import Store

QUICKSTART = ROOT / "configs" / "quickstart"
SOURCES = ["arithmetic.jsonl", "facts.csv", "python.json", "writing.jsonl"]
CPU = Machine(2, 25.0)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Config]:
    """Write a recipe and read it again."""

    def made(
        files: list[str],
        targets: list[str] | None = None,
        machine: Machine = CPU,
        choices: Choices | None = None,
    ) -> Config:
        output = tmp_path / "made" / "mine.yaml"
        output.parent.mkdir(exist_ok=True)
        text = recipe_text(
            files, targets or [], str(output), machine, choices or Choices(),
            Store(str(tmp_path / "scratch")),
        )  # fmt: skip
        output.write_text(text)
        check(yaml.safe_load(text))
        return read_config(str(output), [f"execution.run={tmp_path}/run"])

    return made


def lines_of(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("with_targets", [True, False])
def test_the_recipe_runs_at_once(
    write: Callable[..., Config], tmp_path: Path, with_targets: bool
) -> None:
    targets = [str(QUICKSTART / "targets.jsonl")] if with_targets else []
    config = write([str(QUICKSTART / name) for name in SOURCES], targets)
    # Fake activations are 8 wide, too narrow for as many latents as a student has.
    if config.dictionary is not None:
        small = config.dictionary.model_copy(update={"k": 4, "steps": 6, "batch": 32})
        config = config.model_copy(update={"dictionary": small})
    Run(config, lambda _: None, backend=LocalBackend(CountedEngines())).execute()
    assert (tmp_path / "run" / "dataset" / "README.md").exists()
    assert bool(config.mixture) == with_targets


def test_counts_are_those_of_ingest(write: Callable[..., Config], tmp_path: Path) -> None:
    config = write([str(QUICKSTART / name) for name in SOURCES])
    Run(config, lambda _: None, backend=LocalBackend(CountedEngines())).execute("ingest")
    report = json.loads((tmp_path / "run/ingest/manifest.json").read_text())["report"]
    text = (tmp_path / "made/mine.yaml").read_text()
    for name, counts in report["sources"].items():
        assert f'- name: "{name}" ' in text
        assert f"# {counts['in']} records, {counts['kept']} rows" in text


def test_what_records_hold_is_recognised(
    write: Callable[..., Config], rows_of: Any, tmp_path: Path
) -> None:
    boxed = [
        {"problem": f"What is {n} and {n}?", "solution": rf"It is \boxed{{{2 * n}}}."}
        for n in range(9)
    ]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(9)]
    worse = [*rows_of("plums", 0, 6), *({"question": "", "answer": "x"} for _ in range(3))]
    config = write(
        [
            str(QUICKSTART / "arithmetic.jsonl"),
            lines_of(tmp_path / "boxed sums.jsonl", boxed),
            lines_of(tmp_path / "pairs.jsonl", pairs),
            lines_of(tmp_path / "worse.jsonl", worse),
        ],
        [str(QUICKSTART / "targets.jsonl")],
    )
    sources = {source.name: source for source in config.sources}
    assert sources["arithmetic"].answer_pattern == r"####\s*(.+)$"
    assert sources["boxed-sums"].answer_pattern == "boxed"
    assert sources["pairs"].preference == "chosen"
    assert sources["pairs"].answer_pattern is None
    assert sources["worse"].max_reject_rate == 0.34
    assert sources["arithmetic"].max_reject_rate is None
    assert config.targets[0].task_column == "task"


def test_files_of_one_name_are_told_apart(
    write: Callable[..., Config], rows_of: Any, tmp_path: Path
) -> None:
    paths = []
    for word in ("apples", "pears"):
        (tmp_path / word).mkdir()
        paths.append(lines_of(tmp_path / word / "train.jsonl", rows_of(word, 0, 5)))
    assert [source.name for source in write(paths).sources] == ["train", "train-2"]


def test_files_without_rows_are_named(write: Callable[..., Config], tmp_path: Path) -> None:
    path = lines_of(tmp_path / "odd.jsonl", [{"ask": "a", "reply": "b"}])
    with pytest.raises(ConfigError, match=r"odd\.jsonl.*1 unknown_form.*columns ask, reply"):
        write([path])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.jsonl holds no record; leave it out"):
        write([str(tmp_path / "empty.jsonl")])
    with pytest.raises(ConfigError, match="gone"):
        write([str(tmp_path / "gone.jsonl")])


@pytest.mark.parametrize("gpus", [(24.0,), (80.0,), (141.0,), (80.0, 80.0)])
def test_models_fit_the_gpus(
    gpus: tuple[float, ...],
    write: Callable[..., Config],
    rows_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: name == "vllm" or None)
    machine = Machine(16, 128.0, gpus)
    student, teacher = proposed_student(machine), proposed_teacher(machine)
    assert teacher is not None
    assert teacher in CHAT_MODELS
    config = write([lines_of(tmp_path / "apples.jsonl", rows_of("apples", 0, 5))], [], machine)
    placed = config.execution.engines
    shares = [placed["student"].gpus, placed["teacher"].gpus]
    assert sum(shares) <= len(gpus)
    assert max(shares) <= 1
    # In 16 bits; vLLM takes nine tenths of the GPU that it shares.
    assert 2 * student.parameters <= gpus[0] * (0.1 if len(gpus) == 1 else 1)
    assert 2 * teacher.parameters <= gpus[0] * 0.9
    assert config.models["teacher"].engine == "vllm"
    assert config.reflection is not None


def test_a_machine_without_gpu_gets_no_teacher(
    write: Callable[..., Config], rows_of: Any, tmp_path: Path
) -> None:
    path = lines_of(tmp_path / "apples.jsonl", rows_of("apples", 0, 5))
    assert write([path]).reflection is None
    named = write([path], choices=Choices(teacher="some/teacher", encoder="some/encoder"))
    assert named.models["teacher"].model == "some/teacher"
    assert "encoder" not in named.models


def test_a_recipe_that_is_there_stays(tmp_path: Path, rows_of: Any) -> None:
    path = lines_of(tmp_path / "apples.jsonl", rows_of("apples", 0, 5))
    output = tmp_path / "mine.yaml"
    arguments = ["init", path, "-o", str(output)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "tamis.schema.json").exists()
    output.write_text("name: edited\n")
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert output.read_text() == "name: edited\n"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert read_config(str(output)).sources[0].name == "apples"


def test_a_recipe_at_a_url_names_local_files_that_can_be_found(
    tmp_path: Path, rows_of: Any
) -> None:
    path = lines_of(tmp_path / "apples.jsonl", rows_of("apples", 0, 5))
    output = (tmp_path / "there" / "mine.yaml").as_uri()
    done = CliRunner().invoke(app, ["init", path, "-o", output])
    assert done.exit_code == 0, done.output
    assert content_of(read_config(output).sources)["apples"][0][0] == "apples.jsonl"


def test_what_a_recipe_cannot_name_or_where_it_cannot_be_is_said(
    tmp_path: Path, rows_of: Any
) -> None:
    path = lines_of(tmp_path / "a${HOME}b.jsonl", rows_of("apples", 0, 5))
    done = CliRunner().invoke(app, ["init", path, "-o", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 2
    assert "environment variable" in done.stderr
    path = lines_of(tmp_path / "apples.jsonl", rows_of("apples", 0, 5))
    done = CliRunner().invoke(app, ["init", path, "-o", f"{path}/mine.yaml"])
    assert done.exit_code == 2
    assert "can't be written" in done.stderr


@pytest.mark.parametrize("name", ["2024-05-01", "2024", "true", "null", "1e3", "_mine", "-"])
def test_names_that_yaml_would_read_otherwise_stay_names(tmp_path: Path, name: str) -> None:
    record = {"question": "What is an apple?", "answer": "A fruit."}
    path = lines_of(tmp_path / f"{name}.jsonl", [record])
    goal = lines_of(tmp_path / f"{name}-goal.jsonl", [{**record, "question": "And a pear, then?"}])
    output = tmp_path / f"{name}.yaml"
    text = recipe_text([path], [goal], str(output), CPU, Choices(), Store(str(tmp_path / "s")))
    output.write_text(text)
    check(yaml.safe_load(text))
    config = read_config(str(output))
    assert name.strip("-_") in config.name
    assert [name.strip("-_") in source.name for source in config.sources] == [True]
    assert config.execution.run.endswith(f"runs/{config.name}")


def test_terms_of_a_teacher_that_is_named_are_left_to_the_user(
    write: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Machine(8, 64.0, (80.0,))
    monkeypatch.setattr(models, "find_spec", lambda _: True)
    files = [str(QUICKSTART / "facts.csv")]
    assert write(files, machine=gpu).models["teacher"].terms == "apache-2.0"
    named = write(files, machine=gpu, choices=Choices(teacher="someone/else-7b"))
    assert named.models["teacher"].terms != "apache-2.0"
