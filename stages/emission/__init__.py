"""Emission stage: the shards that trainers read, with a card, a report and a lineage."""

from stages.emission.settings import EmissionSettings
from stages.emission.stage import EmissionStage

__all__ = ["EmissionSettings", "EmissionStage"]
