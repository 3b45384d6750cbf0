"""`tamis train-sae`: a tiny random student, real files, kill and resume, and what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.train_sae.config import read_train_sae
from pipeline.train_sae.progress import progress_line
from pipeline.train_sae.rows import Place, Pool
from pipeline.train_sae.runner import Progress, train_sae
from stages.dictionary.checkpoint import sae_from_bytes
from stages.engines import MaskedSequence
from stages.engines.model_files import load_causal_lm
from stages.engines.reader import TransformersReader
from stages.engines.settings import ModelSettings
from stages.engines.splicer import TransformersSplicer
from stages.errors import ConfigError, RowError, StageError
from stages.rows import key_hash, row_id
from stages.sources.files import files_of
from stages.sources.settings import Source

WIDTH, BLOCKS, LAYER = 16, 3, 1


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: Any) -> str:
    """A random Llama with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(student_tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    student_tokenizer.save_pretrained(folder)
    return str(folder)


class Recipe:
    def __init__(self, folder: Path, student: str) -> None:
        self.folder = folder
        rows = [
            {
                "question": f"What is {i} plus {i % 7}?",
                "answer": f"It is {i + i % 7}. " * (1 + i % 4),
            }
            for i in range(260)
        ]
        for name, part in (("sums", rows[:150]), ("more", rows[140:])):
            lines = [json.dumps(row) + "\n" for row in part]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        self.value: dict[str, Any] = {
            "name": "tiny",
            "seed": 3,
            "sources": [{"name": name, "path": f"{name}.jsonl"} for name in ("sums", "more")],
            "models": {
                "student": {
                    "model": student, "max_length": 64, "batch_tokens": 512, "threads": 1
                }
            },
            "autoencoder": {"layer": LAYER, "expansion": 4, "k": 4},
            "training": {
                "tokens": 4000, "batch": 64, "buffer": 512, "learning_rate": 0.003,
                "held_out_share": 0.1, "evaluation_tokens": 300,
            },
            "execution": {"run": str(folder / "run"), "checkpoint_every": 7},
        }  # fmt: skip

    @property
    def path(self) -> str:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.value, sort_keys=False))
        return str(path)

    @property
    def run_folder(self) -> Path:
        return Path(self.value["execution"]["run"])

    def train(self, *overrides: str) -> Any:
        shown: list[Progress] = []
        done = train_sae(read_train_sae(self.path, overrides), lambda line: None, shown.append)
        return done, shown


@pytest.fixture
def recipe(tmp_path: Path, tiny_student: str) -> Recipe:
    return Recipe(tmp_path, tiny_student)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_student: str) -> Any:
    """A finished training, with what was shown meanwhile."""
    recipe = Recipe(tmp_path_factory.mktemp("trained"), tiny_student)
    done, shown = recipe.train()
    return recipe, done, shown


def weights(folder: Path) -> bytes:
    return (folder / "sae_weights.safetensors").read_bytes()


# What comes out


def test_report_counts_what_was_read_and_trained_on(trained: Any) -> None:
    recipe, done, shown = trained
    assert not done.was_complete
    assert done.report["rows"] == {"sums": 150, "more": 120}
    assert done.report["tokens"] == 62 * 64 == shown[-1].tokens
    assert [progress.step for progress in shown] == list(range(1, 63))
    points = [json.loads(line) for line in (recipe.run_folder / "metrics.jsonl").open()]
    assert [point["step"] for point in points] == list(range(1, 63))
    assert [point["fvu"] for point in points] == [progress.fvu for progress in shown]
    assert points[-1]["fvu"] < points[0]["fvu"]
    assert points[-1]["tokens"] == 62 * 64
    assert done.report["dead_share"] == points[-1]["dead_share"]


def test_active_latents_of_unseen_tokens_are_near_k(trained: Any) -> None:
    _, done, _ = trained
    assert done.report["held_out"]["l0"] == pytest.approx(4, rel=0.15)


def test_curve_is_one_readable_svg_with_a_point_a_step(trained: Any) -> None:
    recipe, _, _ = trained
    root = xml.etree.ElementTree.fromstring((recipe.run_folder / "curve.svg").read_text())
    lines = [node.get("d", "") for node in root.iter() if node.get("class") == "line"]
    assert [line.count("L") for line in lines] == [61, 61, 61]
    heights = [float(spot.split()[1]) for spot in lines[0][1:].split("L")]
    assert heights[-1] > heights[0]


def test_files_are_as_the_manifest_says_and_nothing_is_left_over(trained: Any) -> None:
    import hashlib

    recipe, _, _ = trained
    manifest = json.loads((recipe.run_folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        data = (recipe.run_folder / entry["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    listed = {entry["path"] for entry in manifest["files"]}
    assert listed | {"manifest.json", "identity.json"} == set(os.listdir(recipe.run_folder))


def test_autoencoder_says_where_it_comes_from(trained: Any) -> None:
    import hashlib

    recipe, _, _ = trained
    cfg = json.loads((recipe.run_folder / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("jumprelu", WIDTH, 4 * WIDTH)
    metadata = cfg["metadata"]
    content = hashlib.sha256((recipe.folder / "sums.jsonl").read_bytes()).hexdigest()
    assert metadata["sources"]["sums"] == {"sums.jsonl": f"sha256:{content}"}
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["hf_hidden_states_index"] == 2
    assert metadata["training_tokens"] == 62 * 64
    assert metadata["recipe"]["autoencoder"]["k"] == 4
    assert str(recipe.folder) not in json.dumps(cfg)


@pytest.mark.parametrize("training", ["batchtopk", "topk"])
def test_saved_file_has_the_same_codes_in_sae_lens(recipe: Recipe, training: str) -> None:
    import sae_lens

    recipe.value["autoencoder"]["training"] = training
    recipe.train("training.tokens=1000")
    oracle = sae_lens.SAE.load_from_disk(recipe.run_folder)
    files = {p.name: p.read_bytes() for p in recipe.run_folder.iterdir()}
    x = 3 * torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    sae = sae_from_bytes(files)
    assert sae.config.architecture == ("jumprelu" if training == "batchtopk" else "topk")
    torch.testing.assert_close(sae.encode(x), oracle.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), oracle(x), rtol=1e-5, atol=1e-5)
    assert (sae.encode(x) > 0).any()


def test_held_out_measures_equal_a_loop_over_the_held_out_rows(trained: Any) -> None:
    """FVU and CE recovered, one row at a time, by the library's own model and loss."""
    recipe, done, _ = trained
    config = read_train_sae(recipe.path)
    model = load_causal_lm(config.student)
    sae = sae_from_bytes({p.name: p.read_bytes() for p in recipe.run_folder.iterdir()})
    sequences = held_out_sequences(recipe)
    states, totals, tokens = [], np.zeros(3), 0
    for sequence in sequences:
        ids = torch.tensor([list(sequence.ids)])
        kept = torch.tensor(list(sequence.keep))
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
            states.append(hidden[kept])
            for kind, made in enumerate((None, sae(hidden), torch.zeros_like(hidden))):
                logits = logits_with(model, ids, kept, made)
                losses = -logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                totals[kind] += float(losses[kept[1:]].sum())
        tokens += int(kept[1:].sum())
    x = torch.cat(states).double()
    with torch.no_grad():
        missed = (x - sae(x.float()).double()).square().sum()
    fvu = float(missed / (x - x.mean(0)).square().sum())
    clean, spliced, ablated = (totals / tokens).tolist()

    found = done.report["held_out"]
    assert found["rows"] == len(sequences)
    assert found["tokens"] == len(x)
    assert found["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert found["ce"] == pytest.approx(
        {"clean": clean, "spliced": spliced, "ablated": ablated}, abs=1e-4
    )
    expected = (ablated - spliced) / (ablated - clean)
    assert found["ce_recovered"] == pytest.approx(expected, rel=1e-2)
    assert clean < spliced
    assert spliced != pytest.approx(ablated, abs=1e-3)


def held_out_sequences(recipe: Recipe) -> list[MaskedSequence]:
    """Rows of lowest hash, below a tenth of all hashes, until they hold 300 tokens."""
    from stages.engines.model_files import cached_tokenizer
    from stages.features.tokens import masked_sequence

    rows = {}
    for name in ("sums", "more"):
        for line in (recipe.folder / f"{name}.jsonl").open():
            row = json.loads(line)
            messages = [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"].strip()},
            ]
            messages[1]["content"] = row["answer"]
            rows[key_hash(row_id(messages, None), 3)] = messages  # type: ignore[arg-type]
    tokenizer = cached_tokenizer(read_train_sae(recipe.path).student)
    chosen: list[MaskedSequence] = []
    for key in sorted(rows):
        if key < 0.1 * 2**64 and sum(sum(one.keep) for one in chosen) < 300:
            chosen.append(masked_sequence(tokenizer, rows[key], "both", 64))  # type: ignore[arg-type]
    return chosen


def logits_with(model: Any, ids: Any, kept: Any, made: Any) -> Any:
    """Logits with other states at the kept places after the block."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, kept] = made[kept]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    if made is None:
        return model(ids).logits
    handle = model.model.layers[LAYER].register_forward_hook(hook)
    logits = model(ids).logits
    handle.remove()
    return logits


def test_splicing_in_what_is_there_changes_nothing(tiny_student: str) -> None:
    settings = ModelSettings(model=tiny_student, max_length=64, batch_tokens=64, threads=1)
    draws = np.random.default_rng(0)
    sequences = []
    for length in (30, 2, 7, 19):
        ids = draws.integers(100, 40_000, length).tolist()
        sequences.append(MaskedSequence(ids, (draws.random(length) < 0.7).tolist()))
    splicer = TransformersSplicer(settings)
    clean = splicer.spliced(sequences, LAYER)
    same = splicer.spliced(sequences, LAYER, lambda states: states)
    other = splicer.spliced(sequences, LAYER, lambda states: states + 1)
    assert np.array_equal(clean.sums, same.sums)
    assert clean.counts.tolist() == [sum(sequence.keep[1:]) for sequence in sequences]
    assert not np.allclose(clean.sums, other.sums)
    seen = []
    splicer.spliced(sequences, LAYER, lambda states: seen.append(states) or states)  # type: ignore[func-returns-value]
    read = TransformersReader(settings).activations(sequences, LAYER)
    assert np.allclose(np.sort(torch.cat(seen).numpy(), 0), np.sort(read, 0), atol=1e-5)


# Interruption


def test_killed_training_goes_on_to_the_same_weights(trained: Any, recipe: Recipe) -> None:
    """SIGKILL at three moments; what is left goes on from the last checkpoint."""
    whole, _, _ = trained
    kills = 0
    for enough in (1, 3, 6):
        metrics = recipe.run_folder / "metrics.jsonl"
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "train-sae", recipe.path],
            cwd=ROOT,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= 7 * enough:
                child.send_signal(signal.SIGKILL)
                break
            os.sched_yield()
        kills += child.wait() == -signal.SIGKILL
        if (recipe.run_folder / "manifest.json").exists():
            break
    assert kills
    done, shown = recipe.train()
    if not done.was_complete:
        assert shown[0].step > 7
    assert weights(recipe.run_folder) == weights(whole.run_folder)
    for name in ("metrics.jsonl", "curve.svg", "report.json", "manifest.json", "cfg.json"):
        assert (recipe.run_folder / name).read_bytes() == (whole.run_folder / name).read_bytes()
    assert not (recipe.run_folder / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("step", [7, 20, 61, 62])
def test_failed_training_goes_on_to_the_same_weights(
    trained: Any, recipe: Recipe, step: int
) -> None:
    whole, _, _ = trained

    stopped_after(recipe, step)
    assert not (recipe.run_folder / "manifest.json").exists()
    _, shown = recipe.train()
    assert shown[0].step == 7 * ((step - 1) // 7) + 1
    assert weights(recipe.run_folder) == weights(whole.run_folder)


def test_finished_training_is_left_alone_and_another_is_refused(
    trained: Any, recipe: Recipe
) -> None:
    whole, first, _ = trained
    again, shown = whole.train("execution.checkpoint_every=1")
    assert again.was_complete
    assert again.report == first.report
    assert not shown
    with pytest.raises(ConfigError, match=r"holds another training: recipe\.seed: 3 → 4"):
        whole.train("seed=4")
    recipe.train("training.tokens=1000")
    (recipe.folder / "sums.jsonl").write_text('{"question": "Q?", "answer": "A."}\n')
    with pytest.raises(ConfigError, match=r"sources\.sums\.sums\.jsonl: 'sha256"):
        recipe.train("training.tokens=1000")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("report.json", r"report\.json is missing"),
        ("sae_weights.safetensors", r"sae_weights\.safetensors is missing"),
        ("curve.svg", r"curve\.svg has changed"),
    ],
)
def test_finished_training_that_lost_files_says_so(
    trained: Any, recipe: Recipe, name: str, message: str
) -> None:
    shutil.copytree(trained[0].run_folder, recipe.run_folder)
    if "changed" in message:
        (recipe.run_folder / name).write_text("<svg/>")
    else:
        (recipe.run_folder / name).unlink()
    with pytest.raises(StageError, match=f"{message}: put back .* or remove manifest.json"):
        recipe.train()
    whole = (trained[0].run_folder / name).read_bytes()
    (recipe.run_folder / name).write_bytes(whole)
    assert recipe.train()[0].was_complete


def stopped_after(recipe: Recipe, step: int) -> None:
    def show(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(read_train_sae(recipe.path), lambda line: None, show)


@pytest.mark.parametrize("left", [0, 2000])
def test_damaged_checkpoint_says_what_to_do(recipe: Recipe, left: int) -> None:
    stopped_after(recipe, 9)
    checkpoint = recipe.run_folder / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:left])
    with pytest.raises(StageError, match=r"checkpoint\.safetensors is damaged .* or remove it to"):
        recipe.train()
    save_file({"other": torch.ones(2)}, checkpoint)
    with pytest.raises(StageError, match=r"checkpoint\.safetensors is damaged .* or remove it to"):
        recipe.train()


def test_same_weights_in_a_store(trained: Any, recipe: Recipe) -> None:
    from stages.storage import Store

    whole, _, _ = trained
    recipe.train("execution.run=memory://train-sae")
    assert Store("memory://train-sae").read_bytes("sae_weights.safetensors") == weights(
        whole.run_folder
    )


def test_command(trained: Any) -> None:
    whole, _, _ = trained
    done = CliRunner().invoke(app, ["train-sae", whole.path])
    assert done.exit_code == 0, done.output
    assert "nothing to do" in done.output
    assert "CE recovered" in done.output
    wrong = CliRunner().invoke(app, ["train-sae", whole.path, "--set", "sed=1"])
    assert wrong.exit_code == 2


def test_progress_line_says_how_long_is_left() -> None:
    line = progress_line(Progress(100, 400, 204_800, 1024.0, 0.25, 31.6, 0.125))
    assert line == (
        "step 100/400: 204,800 tokens, 1,024 tokens/s, FVU 0.2500, L0 31.6, dead 12.5%, "
        "about 10 min 0 s left"
    )


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("autoencoder.k=65", r"autoencoder\.k: 65 exceeds the 64 latents"),
        ("autoencoder.layer=3", r"autoencoder\.layer: 3, and .* has 3 blocks.* at most 2"),
        ("autoencoder.latents=9", "one of expansion and latents"),
        ("training.tokens=100", r"buffer: 512 holds more than all 100 tokens"),
        ("training.tokens=40", "less than one batch of 64"),
        ("training.buffer=100", "room for two batches of 64"),
        ("training.tokens=9000", r"the sources give \d{4} tokens of part: both in a pass, 1 of"),
        ("training.held_out_share=0.000001", "none of 270 rows is held out"),
        ("sources.0.path=gone.jsonl", "gone.jsonl doesn't exist"),
        ("sources.0.name=more", "two sources are called more"),
        ("autoencoder.student=nobody", "names the model 'nobody'"),
        ("models.student.engine=vllm", "'student' of engine vllm, which gives no activations"),
        ("training.bach=3", r"training\.bach: unknown key; did you mean 'batch'"),
    ],
)
def test_mistakes_are_found_before_the_student_is_loaded(
    recipe: Recipe, change: str, message: str
) -> None:
    def make(kind: str, model: ModelSettings) -> Any:
        raise AssertionError("a model was loaded")

    with pytest.raises(ConfigError, match=message):
        train_sae(
            read_train_sae(recipe.path, [change]), lambda line: None, lambda shown: None, make
        )


def test_source_that_mostly_cannot_be_read_is_refused(recipe: Recipe) -> None:
    with (recipe.folder / "more.jsonl").open("a") as file:
        file.write("{broken\n" * 60)
    with pytest.raises(ConfigError, match=r"sources: more: 60 of 180 records can't be read"):
        recipe.train()
    recipe.value["sources"][1]["max_reject_rate"] = 0.5
    done, _ = recipe.train("training.tokens=1000")
    assert done.report["rejected"] == {"sums": 0, "more": 60}


def test_loss_that_isn_t_finite_says_what_to_lower(recipe: Recipe) -> None:
    with pytest.raises(StageError, match=r"step \d+ of 62: lower training.learning_rate \(1e\+30"):
        recipe.train("training.learning_rate=1e30", "training.warmup_share=0")


# The order of the rows


def pool(folder: Path, files: dict[str, list[int]], share: float = 0.1, seed: int = 0) -> Pool:
    """A pool over files of numbered rows; a row's tokens are its number, one a digit sum."""
    sources = []
    for name, numbers in files.items():
        lines = [json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        source = Source(name=name, path=str(folder / f"{name}.jsonl"))
        sources.append((source, files_of(source)))

    def sequenced(messages: Any) -> MaskedSequence:
        number = int(messages[1]["content"])
        if number % 50 == 0:
            raise RowError("no_tokens: a round number")
        return MaskedSequence([number], [True])

    return Pool(sources, seed, share, sequenced)


def read(
    pool: Pool, *, after: Place | None = None, passes: int = 1
) -> list[tuple[list[int], Place]]:
    return [
        ([one.ids[0] for one in chunk], place)
        for chunk, place in pool.chunks(after or Place(), passes, 10)
    ]


@pytest.mark.parametrize("window", [7, 50_000])
def test_rows_are_read_once_a_pass_and_held_out_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr("pipeline.train_sae.rows._WINDOW", window)
    rows = pool(tmp_path, {"a": list(range(200)), "b": list(range(150, 300))})
    survey = rows.survey(10**6, 12)
    order = [n for chunk, _ in read(rows) for n in chunk]
    second = [n for chunk, _ in read(rows, passes=2) for n in chunk][len(order) :]
    held_out = set(range(300)) - set(order) - set(range(0, 300, 50))
    assert sorted(order) == sorted(second)
    assert len(set(order)) == len(order) == survey.tokens
    assert order != second
    assert 10 < len(held_out) < 60
    assert {one.ids[0] for one in survey.held_out} <= held_out
    assert len(survey.held_out) == 12
    # A random order: neighbours in a file aren't neighbours here.
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


def test_order_depends_on_neither_windows_nor_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pool(tmp_path, {"a": list(range(300))})
    one.survey(1, 1)
    expected = read(one, passes=2)
    monkeypatch.setattr("pipeline.train_sae.rows._WINDOW", 11)
    two = pool(tmp_path, {"b": list(range(299, 99, -1)), "a": list(range(120))})
    two.survey(1, 1)
    assert read(two, passes=2) == expected
    other = pool(tmp_path, {"a": list(range(300))}, seed=1)
    other.survey(1, 1)
    assert read(other) != expected


@pytest.mark.parametrize("stop", [0, 5, 28, 40])
def test_stream_goes_on_after_a_place(tmp_path: Path, stop: int) -> None:
    rows = pool(tmp_path, {"a": list(range(300))})
    rows.survey(1, 1)
    whole = read(rows, passes=2)
    assert read(rows, after=whole[stop][1], passes=2) == whole[stop + 1 :]


def test_counting_stops_where_there_are_tokens_enough(tmp_path: Path) -> None:
    rows = pool(tmp_path, {"a": list(range(300))})
    assert rows.survey(20, 1).tokens == 20
    assert len(rows.survey(20, 5).held_out) == 5
