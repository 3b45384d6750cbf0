"""How strongly a row's correct rollouts pull at the model."""

from __future__ import annotations

from collections.abc import Sequence

from stages.engines import ScoreRequest, TokenScorer
from stages.pass_rate.rollouts import Problem, Rollout


async def gradient_norms(
    problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]], scorer: TokenScorer
) -> list[float | None]:
    r"""Mean gradient norm of every problem's correct rollouts; None where there is none.

    .. math:: G_i = \frac{1}{c_i} \sum_{j : \text{correct}} \bigl\lVert \nabla_E \ln p(y_{ij} \mid
        x_i) \bigr\rVert_2

    E is the matrix of input embeddings and :math:`y_{ij}` the rollout's tokens without the end
    marker, which completions don't keep. Source: GVM-RAFT (arXiv 2505.02391), Algorithm 1 and
    Appendix B.
    """
    correct = [
        (place, ScoreRequest(problem.prompt_ids, rollout.completion.token_ids))
        for place, (problem, drawn) in enumerate(zip(problems, rollouts, strict=True))
        for rollout in drawn
        if rollout.verdict == "correct" and rollout.completion.token_ids
    ]
    found: list[list[float]] = [[] for _ in problems]
    if correct:
        norms = await scorer.gradient_norms([request for _, request in correct])
        for (place, _), norm in zip(correct, norms.tolist(), strict=True):
            found[place].append(norm)
    return [sum(values) / len(values) if values else None for values in found]
