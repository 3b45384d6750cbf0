"""The first stage: from files in many forms to rows in one form, with a reason for every reject."""

from stages.ingest.ingest import SCRATCH, ingest
from stages.ingest.parse import Reject, Row, content_of, iter_rows
from stages.ingest.report import IngestReport, SourceReport
from stages.ingest.settings import (
    ContaminationSettings,
    IngestSettings,
    NearDuplicateSettings,
)

__all__ = [
    "SCRATCH",
    "ContaminationSettings",
    "IngestReport",
    "IngestSettings",
    "NearDuplicateSettings",
    "Reject",
    "Row",
    "SourceReport",
    "content_of",
    "ingest",
    "iter_rows",
]
