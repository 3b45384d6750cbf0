"""`croissant.json`: what the files hold, for search engines and data loaders.

Format: Croissant 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from stages.emission import concepts, prefix
from stages.emission.card import about
from stages.emission.facts import Facts
from stages.emission.shards import FOLDERS, ShardFile

_PARQUET = "application/x-parquet"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        name: f"cr:{name}"
        for name in (
            "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject",
            "fileProperty", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key",
            "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace",
            "samplingRate", "separator", "source", "subField", "transform",
        )
    },
}  # fmt: skip
_ABOUT = {
    "messages": "The conversation: turns with role and content; the last one is the response.",
    "prompt": "All turns but the last.",
    "completion": "The last turn.",
    "instruction": "The last user turn.",
    "input": "Always empty: it was joined to the instruction.",
    "output": "The response.",
    "system": "The system turn.",
    "history": "Earlier pairs of question and answer.",
    "tools": "Tool definitions as JSON.",
    "id": "Hash of the conversation as it was read.",
    "source": "Name of the source.",
    "provenance": "Licence, scores, and the original text of a rewritten row.",
    "input_ids": "Token ids of the text.",
    "attention_mask": "1 for every token.",
    "labels": "The solution's ids; -100 where there is no loss.",
    "kind": "`prefix`, or `full` for a whole solution.",
    "text": "The solution as text.",
    "concept_ids": "Latents of each token, strongest first; -1 where a slot holds none.",
    "concept_scores": "Their attributions; 0 where a slot holds none.",
    "row_concepts": "Latents of the row, strongest first.",
    "row_scores": "Their mean attributions.",
}


def croissant_json(facts: Facts, schema: pa.Schema) -> bytes:
    """The description; equal runs give equal bytes.

    Args:
        facts: of the data set.
        schema: of its rows.
    """
    sets: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for split in facts.splits:
        sets.append(_file_set(f"{split}-files", f"{FOLDERS[split]}/{split}-*.parquet"))
        records.append(_record_set(split, f"{split}-files", schema))
    for split in facts.prefix.lines if facts.prefix else ():
        name = f"prefix-{split}"
        sets.append(_file_set(f"{name}-files", f"prefix/{split}-*.parquet"))
        records.append(_record_set(name, f"{name}-files", prefix.SCHEMA))
    for split in facts.concepts:
        name = f"concepts-{split}"
        sets.append(_file_set(f"{name}-files", f"concepts/{split}-*.parquet"))
        records.append(_record_set(name, f"{name}-files", concepts.SCHEMA))
    licenses = sorted(name or "not stated" for name in facts.names_of_licenses)
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": facts.name,
        "description": about(facts),
        "license": licenses if len(licenses) > 1 else licenses[0],
        "keywords": ["instruction-tuning"],
        "distribution": [*map(_file_object, facts.shards), *sets],
        "recordSet": records,
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _file_object(file: ShardFile) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": file.name,
        "name": file.name,
        "contentUrl": file.name,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": _PARQUET,
        "sha256": file.sha256,
    }


def _file_set(name: str, includes: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": _PARQUET,
        "includes": includes,
    }


def _record_set(name: str, files: str, schema: pa.Schema) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "field": [_field(name, files, column) for column in schema],
    }


def _field(record: str, files: str, column: pa.Field) -> dict[str, Any]:
    """A column; of structs, the fields that aren't lists themselves, as Croissant nests once."""
    kind, repeated = column.type, False
    while pa.types.is_list(kind):
        kind, repeated = kind.value_type, True
    extract = {"fileSet": {"@id": files}, "extract": {"column": column.name}}
    value: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{record}/{column.name}",
        "name": column.name,
        "description": _ABOUT[column.name],
        **({"repeated": True} if repeated else {}),
    }
    if not pa.types.is_struct(kind):
        return value | {"dataType": _data_type(kind), "source": extract}
    return value | {
        "subField": [
            {
                "@type": "cr:Field",
                "@id": f"{record}/{column.name}/{part.name}",
                "name": part.name,
                "dataType": _data_type(part.type),
                "source": {**extract, "transform": {"jsonPath": part.name}},
            }
            for part in kind
            if not pa.types.is_list(part.type)
        ]
    }


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "sc:Float"
    return "sc:Boolean" if pa.types.is_boolean(kind) else "sc:Text"
