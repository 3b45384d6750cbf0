"""A sparse autoencoder, trained as a Ray job; a retry goes on from the last checkpoint.

The default of the param `recipe` is taken from TAMIS_SAE_RECIPE in the environment of the DAG
processor.
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Asset, Param

from tamis_ray_operator import PLACE, TamisOperator

with DAG(
    "train_sae",
    description="Train a sparse autoencoder with tamis",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
    params={
        "recipe": Param(
            os.environ.get("TAMIS_SAE_RECIPE", ""),
            type="string",
            minLength=1,
            description="The recipe: a path or URL that the cluster's head can read.",
        ),
        "run": Param(
            "",
            type="string",
            minLength=1,
            pattern=PLACE,
            description="Where the autoencoder goes: an absolute path or URL.",
        ),
    },
    doc_md=__doc__,
    tags=["tamis"],
) as dag:
    TamisOperator(
        task_id="train_sae",
        command=["train-sae", "{{ params.recipe }}"],
        settings={"execution.run": "{{ params.run }}"},
        pool="tamis_gpu",
        outlets=[Asset("tamis_autoencoder")],
    )
