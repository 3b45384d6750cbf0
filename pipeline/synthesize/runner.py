"""`tamis synthesize run`: samples, filters, solutions, attempts, and a new source of what is left.

One model is open at a time, in this process. What a model wrote is in the cache, chunk by chunk, so
that the same command goes on after an interruption; the output appears at the end, its manifest
last.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import __version__
from pipeline.config import changed_fields
from pipeline.identity import endpoint_identity, library_version, model_settings
from pipeline.rejects import reject_limit
from pipeline.rundir import MANIFEST, RunLock
from pipeline.synthesize.config import SynthesisConfig
from stages.engines import Sampling
from stages.engines.chat import chat_generator
from stages.engines.chat_cache import CachedChat
from stages.engines.generation_cache import CachedGenerator
from stages.engines.local import handle_of, make_engine
from stages.engines.model_files import cached_tokenizer, model_identity, threads_of
from stages.engines.settings import ModelSettings
from stages.errors import ConfigError, StageError
from stages.ingest.parse import Row, content_of, iter_rows
from stages.ingest.settings import IngestSettings
from stages.rows import canonical_json
from stages.sources.files import SourceFile, files_of
from stages.sources.settings import Source, Target
from stages.storage import Store
from stages.synthesis.asking import Asker
from stages.synthesis.filters import reject_overlaps, reject_problems
from stages.synthesis.headers import user_header_ids
from stages.synthesis.language import check_languages
from stages.synthesis.output import json_lines, reason_counts, reject_record, row_record
from stages.synthesis.problems import sampled_problems
from stages.synthesis.sample import Sample, remaining
from stages.synthesis.solutions import solve
from stages.synthesis.student import reject_solved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Make = Callable[[str, ModelSettings], Any]
Say = Callable[[str], None]

VERSION = 2
"""Goes up when the same recipe comes to give other bytes."""

DATA, REJECTS, REPORT = "data.jsonl", "rejects.jsonl", "report.json"


@dataclass(frozen=True)
class Synthesized:
    """A finished synthesis: its report, and whether it was there before."""

    report: dict[str, Any]
    was_complete: bool


def synthesize(config: SynthesisConfig, say: Say, make: Make = make_engine) -> Synthesized:
    """Make the new source, or go on making it.

    Args:
        config: the recipe.
        say: told what goes on, a line a step.
        make: makes engines.

    Raises:
        ConfigError: something that the recipe names is missing or can't be used, or the folder
            holds the result of another recipe.
        StageError: a step can't go on, or no sample is left.
        RunBusy: another process works in the folder.
    """
    return _Synthesis(config, say, make).run()


class _Synthesis:
    def __init__(self, config: SynthesisConfig, say: Say, make: Make) -> None:
        self._config, self._say, self._make = config, say, make
        self._store = Store(config.execution.run)
        self._tokens: dict[str, int | None] = {}

    def run(self) -> Synthesized:
        config = self._config
        tokenizers = {
            role: cached_tokenizer(config.model_of(role))
            for role in config.roles
            if config.model_of(role).endpoint is None
        }
        self._check(tokenizers)
        avoided = [(one, files_of(one)) for one in (*config.avoid.sources, *config.avoid.targets)]
        identity = self._identity()
        with RunLock(self._store):
            if self._is_complete(identity):
                return Synthesized(self._store.read_json(REPORT), was_complete=True)
            # What an interrupted run left must not pass for a finished source.
            self._store.remove(DATA)
            samples, avoided_rows = asyncio.run(self._samples(tokenizers, avoided))
            return Synthesized(self._written(samples, avoided_rows, identity), was_complete=False)

    def _check(self, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
        """What can be wrong before a model is loaded."""
        config = self._config
        header = len(user_header_ids(tokenizers["generator"]))
        window = config.model_of("generator").max_length
        if header + config.generator.max_new_tokens > window:
            raise ConfigError(
                f"generator.max_new_tokens: {config.generator.max_new_tokens} and a header of "
                f"{header} tokens exceed models.{config.generator.model}.max_length={window}"
            )
        if config.filters.languages is not None:
            check_languages(config.filters.languages)
        for role in config.roles[1:]:
            endpoint = config.model_of(role).endpoint
            if endpoint is not None:
                endpoint.api_key()
            else:
                self._asker(role, tokenizers[role]).prompt("x")

    async def _samples(
        self,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        avoided: Sequence[tuple[Source, list[SourceFile]]],
    ) -> tuple[list[Sample], dict[str, dict[str, int]]]:
        config, seed = self._config, self._config.seed
        self._say(f"{config.generator.samples} samples of problems")

        async def sampled(engine: Any) -> tuple[list[Sample], int]:
            return await sampled_problems(engine, tokenizers["generator"], config.generator, seed)

        samples, self._tokens["generator"] = await self._with_engine("generator", sampled)
        reject_problems(samples, config.filters)
        counts = self._reject_overlaps(samples, avoided)
        if left := len(remaining(samples)):
            self._say(f"{left} problems for the teacher")

            async def solved(engine: Any) -> int | None:
                teacher = config.teacher
                sampling = Sampling(teacher.max_new_tokens, teacher.temperature, teacher.top_p)
                chat = chat_generator(engine, config.model_of("teacher"), teacher.template)
                return await solve(samples, chat, teacher.request, sampling, config.filters, seed)

            self._tokens["teacher"] = await self._with_engine("teacher", solved)
        student = config.student
        if student is not None and (left := len(remaining(samples))):
            self._say(f"{left} solutions for the student to match")

            async def tried(engine: Any) -> int:
                asker = self._asker("student", tokenizers["student"])
                return await reject_solved(samples, engine, asker, student, seed)

            self._tokens["student"] = await self._with_engine("student", tried)
        return samples, counts

    async def _with_engine(self, role: str, work: Callable[[Any], Awaitable[T]]) -> T:
        """What `work` gives with a model that is open for as long."""
        settings = self._config.model_of(role)
        engine = self._make("generator", settings)
        try:
            cache = Store(os.path.expanduser(self._config.execution.cache))
            identity = canonical_json(self._model(role))
            cached = CachedGenerator if settings.endpoint is None else CachedChat
            handle = handle_of(engine, settings)
            return await work(cached(handle, cache, identity, settings.generation_chunk))
        finally:
            engine.close()

    def _asker(self, role: str, tokenizer: PreTrainedTokenizerBase) -> Asker:
        config = self._config
        part = config.student if role == "student" and config.student else config.teacher
        room = config.model_of(role).max_length - part.max_new_tokens
        return Asker(tokenizer, part.request, room, part.template)

    def _reject_overlaps(
        self, samples: list[Sample], avoided: Sequence[tuple[Source, list[SourceFile]]]
    ) -> dict[str, dict[str, int]]:
        """Mark overlaps; how many rows of each source and target were compared."""
        filters = self._config.filters
        counts: dict[str, dict[str, int]] = {}
        for source, files in avoided:
            self._say(f"overlap with {source.name}")
            is_target = isinstance(source, Target)
            count = counts[source.name] = {"rows": 0, "unreadable": 0}
            reject_overlaps(
                samples,
                _texts(source, files, count),
                filters.overlap_words,
                filters.max_target_overlap if is_target else filters.max_source_overlap,
            )
            _check_read(source, count)
        return counts

    def _model(self, role: str) -> dict[str, Any]:
        """What a generation depends on besides its prompt, sampling and seed."""
        settings = self._config.model_of(role)
        if settings.endpoint is not None:
            return endpoint_identity(settings.portable())
        name = self._config.portable_recipe[role]["model"]
        libraries = ("vllm",) if settings.engine == "vllm" else ("torch", "transformers")
        on_gpu = _has_gpu()
        return {
            "kind": "generator",
            "settings": model_settings(self._config.portable_recipe["models"][name]),
            "weights": model_identity(settings.model),
            "numerics": {
                **{library: library_version(library) for library in libraries},
                "machine": platform.machine(),
                "device": "cuda" if on_gpu else "cpu",
                **({} if on_gpu else {"threads": threads_of(settings)}),
            },
        }

    def _identity(self) -> dict[str, Any]:
        """What the output is a function of, in plain values."""
        config = self._config
        avoid = [*config.avoid.sources, *config.avoid.targets]
        return {
            "version": VERSION,
            "recipe": config.portable_recipe,
            "models": {role: self._model(role) for role in config.roles},
            "avoided": {name: dict(files) for name, files in content_of(avoid).items()},
        }

    def _is_complete(self, identity: dict[str, Any]) -> bool:
        if not self._store.exists(MANIFEST):
            return False
        changed = changed_fields(self._store.read_json(MANIFEST)["identity"], identity)
        if changed:
            raise ConfigError(
                f"{self._store.url} holds the result of another recipe: {'; '.join(changed)}; give "
                "another execution.run, or remove the folder"
            )
        return True

    def _written(
        self,
        samples: list[Sample],
        avoided: dict[str, dict[str, int]],
        identity: dict[str, Any],
    ) -> dict[str, Any]:
        """The report, once everything is written.

        Raises:
            StageError: no sample is left; report and rejects are written.
        """
        kept = remaining(samples)
        report: dict[str, Any] = {
            "name": self._config.name,
            "samples": len(samples),
            "rows": len(kept),
            "rejected": reason_counts(samples),
            "tokens": self._tokens,
            "avoided": avoided,
        }
        if len(samples) != len(kept) + sum(report["rejected"].values()):
            raise StageError(
                f"{len(samples)} samples became {len(kept)} rows and "
                f"{sum(report['rejected'].values())} rejects; this is a bug in tamis"
            )
        rejected = [sample for sample in samples if sample.reject is not None]
        files = {
            REJECTS: json_lines(reject_record(sample) for sample in rejected),
            REPORT: (json.dumps(report, indent=2) + "\n").encode(),
        }
        if kept:
            provenance = self._provenance(identity)
            files[DATA] = json_lines(row_record(sample, provenance) for sample in kept)
        for name, data in files.items():
            self._store.write_bytes(name, data)
        if not kept:
            counts = ", ".join(f"{r} {n}" for r, n in report["rejected"].items() if n)
            raise StageError(
                f"none of {len(samples)} samples is left: {counts}. See {self._store.url}/{REJECTS}"
                " and change the generator or the filters"
            )
        self._store.write_json(
            MANIFEST,
            {
                "identity": identity,
                "rows": len(kept),
                "files": [
                    {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    for name, data in sorted(files.items())
                ],
            },
        )
        return report

    def _provenance(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What all rows share: where they come from."""
        models = identity["models"]
        named = {
            role: {
                "model": models[role]["settings"]["model"],
                "weights": models[role]["weights"],
            }
            for role in models
        }
        return {
            "name": self._config.name,
            "seed": self._config.seed,
            **named,
            "versions": {
                "tamis": __version__,
                **{
                    library: found
                    for role in models
                    for library, found in models[role]["numerics"].items()
                    if library in ("torch", "transformers", "vllm")
                },
            },
        }


def _texts(
    source: Source, files: list[SourceFile], count: dict[str, int]
) -> Iterator[tuple[str, list[str]]]:
    """What a source's rows are called, and the texts of their turns; counted on the way."""
    for row in iter_rows(source, IngestSettings(max_chars=None), files):
        if not isinstance(row, Row):
            count["unreadable"] += 1
            continue
        count["rows"] += 1
        texts = [turn["content"] for turn in row.messages if turn["role"] != "system"]
        yield f"{source.name} ({row.file}, record {row.record})", texts


def _check_read(source: Source, count: dict[str, int]) -> None:
    """Refuse a comparison with data that mostly can't be read.

    Raises:
        ConfigError: it holds no row, or too many records that are none.
    """
    records = count["rows"] + count["unreadable"]
    if count["rows"] == 0 or count["unreadable"] > reject_limit(source) * records:
        raise ConfigError(
            f"avoid: {source.name}: {count['unreadable']} of {records} records can't be read, so "
            "that problems can't be compared with them; mend it, name its form, or raise its "
            "max_reject_rate"
        )


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
