"""A recipe, stage by stage: each a Ray job.

Every task runs `tamis stage`, which does what is missing and nothing else, so that a task may be
retried or cleared at any time. `plan` checks the recipe and says which stages it has; the others
are skipped, by the one before them. A stage of another package (`stages.NAME`) has no task here:
`plan` fails and names it.

The defaults of the params and the schedule are taken from the environment of the DAG processor:
TAMIS_RECIPE, TAMIS_RUN and TAMIS_SCHEDULE. A schedule needs both params.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Asset, Param, chain

from tamis_ray_operator import PLACE, TamisOperator

STAGES = {
    "ingest": "cpu",
    "difficulty": "gpu",
    "thinking": "gpu",
    "pass_rate": "gpu",
    "allocation": "cpu",
    "rollouts": "gpu",
    "reasoning": "gpu",
    "replies": "gpu",
    "reflection": "gpu",
    "prefixes": "gpu",
    "dictionary": "gpu",
    "prototypes": "gpu",
    "features": "gpu",
    "concepts": "gpu",
    "embedding": "gpu",
    "baseline_targets": "gpu",
    "baselines": "gpu",
    "potentials": "cpu",
    "valuation": "cpu",
    "selection": "cpu",
    "explanation": "gpu",
    "mixture": "cpu",
    "emission": "cpu",
}
GPU_POOL = "tamis_gpu"

curated = Asset("tamis_curated")

with DAG(
    "curate",
    description="Curate instruction-tuning data with tamis",
    schedule=os.environ.get("TAMIS_SCHEDULE"),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
    params={
        "recipe": Param(
            os.environ.get("TAMIS_RECIPE", ""),
            type="string",
            minLength=1,
            description="The recipe: a path or URL that the cluster's head can read.",
        ),
        "run": Param(
            os.environ.get("TAMIS_RUN", ""),
            type="string",
            minLength=1,
            pattern=PLACE,
            description="The run directory: an absolute path or URL that all nodes can write.",
        ),
    },
    doc_md=__doc__,
    tags=["tamis"],
) as dag:
    recipe, settings = "{{ params.recipe }}", {"execution.run": "{{ params.run }}"}
    plan = TamisOperator(
        task_id="plan",
        command=["plan", "--no-probe", recipe],
        settings=settings,
        stages=list(STAGES),
    )
    tasks = [
        TamisOperator(
            task_id=stage,
            command=["stage", stage, recipe],
            settings=settings,
            among="plan",
            stages=list(STAGES),
            pool=GPU_POOL if where == "gpu" else "default_pool",
            trigger_rule="none_failed",
            outlets=[curated] if stage == "emission" else [],
        )
        for stage, where in STAGES.items()
    ]
    chain(plan, *tasks)
