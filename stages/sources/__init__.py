"""Instruction data as it is found: which files, in which form, and how a record becomes turns."""

from stages.sources.catalogue import known_source, resolved
from stages.sources.files import SourceFile, files_of
from stages.sources.forms import Parsed, detect_form, parse
from stages.sources.readers import BadRecord, Record, records
from stages.sources.reasons import REASONS, code_of
from stages.sources.settings import Source, Target

__all__ = [
    "REASONS",
    "BadRecord",
    "Parsed",
    "Record",
    "Source",
    "SourceFile",
    "Target",
    "code_of",
    "detect_form",
    "files_of",
    "known_source",
    "parse",
    "records",
    "resolved",
]
