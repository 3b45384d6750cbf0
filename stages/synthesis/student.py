"""The student's attempts: a problem that it solves already teaches it nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stages.engines import Sampling, TextGenerator
from stages.pass_rate.checker import AnswerChecker
from stages.pass_rate.rollouts import Problem, Tally, drawn_rollouts
from stages.synthesis.asking import Asker, text_id
from stages.synthesis.sample import Reject, Sample, remaining
from stages.synthesis.settings import StudentSettings


async def reject_solved(
    samples: Sequence[Sample],
    engine: TextGenerator,
    asker: Asker,
    settings: StudentSettings,
    seed: int,
) -> int:
    """Have the student try every problem that is left, and mark those that it solves.

    ScaleDiff (arXiv 2509.21070) leaves a problem out when the student's answer agrees with the
    teacher's. The teacher may be wrong: what stays is hard for the student, or badly solved. An
    attempt that was cut off, or whose answer couldn't be compared in time, says nothing.

    Returns:
        The tokens that were generated.

    Raises:
        EngineError: the engine can't go on.
        StageError: answers can't be compared.
    """
    with AnswerChecker(settings.timeout_s) as checker:
        left = remaining(samples)
        answers = [(settings.check, _answer(sample)) for sample in left]
        reasons = await asyncio.to_thread(checker.unusable, answers)
        for sample, reason in zip(left, reasons, strict=True):
            sample.reject = Reject("unreadable_answer", reason) if reason else None
        asked = asker.prompts(left)
        rollouts = await drawn_rollouts(
            [
                Problem(text_id(sample), prompt, settings.check, _answer(sample))
                for sample, prompt in asked
            ],
            [range(settings.rollouts)] * len(asked),
            engine,
            checker,
            Sampling(settings.max_new_tokens, settings.temperature, settings.top_p),
            seed,
        )
    for (sample, _), drawn in zip(asked, rollouts, strict=True):
        sample.tally = Tally.of([rollout.verdict for rollout in drawn])
        sample.reject = solved_reject(sample.tally, settings.solved_share)
    return sum(len(rollout.completion.token_ids) for drawn in rollouts for rollout in drawn)


def solved_reject(tally: Tally, solved_share: float) -> Reject | None:
    """Why a problem counts as solved: its pass rate is at least a share; None where it doesn't."""
    if tally.pass_rate is None or tally.pass_rate < solved_share:
        return None
    return Reject("solved_by_student", f"{tally.correct} of {tally.decided} attempts")


def _answer(sample: Sample) -> str:
    return (sample.solution.answer if sample.solution else None) or ""
