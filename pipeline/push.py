"""A finished data set, uploaded to a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from typing import Any, cast

from pipeline.flow import folder_of
from pipeline.rundir import opened_run, read_manifest
from stages.emission.shards import FOLDERS
from stages.errors import ConfigError, StageError
from stages.storage import Store

_KEPT = frozenset({"emitted.parquet"})
"""Files that serve the run alone."""
_REPORT = "report.html"
OWN_FILES = (
    *(
        f"{folder}/{split}-?????-of-?????.parquet"
        for split, own in FOLDERS.items()
        for folder in (own, "prefix", "concepts")
    ),
    "concepts/dictionary.json",
    "trainers/trl_sft.py",
    "trainers/axolotl.yaml",
    "README.md",
    "croissant.json",
    "dataset_info.json",
    "lineage.json",
    "recipe.yaml",
    _REPORT,
)
"""Names that files of a data set have: those of an earlier push go, other files stay."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Upload:
    """What would go, or went.

    Attributes:
        files: paths in the repository with their bytes.
        warnings: what to heed before publishing.
        url: where it went; None of a dry run.
    """

    files: dict[str, int]
    warnings: list[str]
    url: str | None


def pushed(url: str, repo: str, *, private: bool, report: bool, dry_run: bool) -> Upload:
    """Upload a run's data set; the token is huggingface_hub's own affair (HF_TOKEN, or a login).

    Only files of the manifest go, and only with the content that it states. The report stays here
    unless it is asked for: it shows rows that were dropped, whatever their licence.

    Args:
        url: the run directory.
        repo: ORG/NAME on the Hub; made where it isn't there.
        private: make it private (an existing repository stays as it is).
        report: upload the report too.
        dry_run: list the files and do nothing.

    Raises:
        ConfigError: the run has no data set, the name is none, or the Hub refuses.
        StageError: a file isn't the one that was written, or the Hub can't be reached.
    """
    run = opened_run(url)
    manifest = read_manifest(run, "emission")
    if manifest is None:
        raise ConfigError(f"{url} has no data set yet; `tamis run` its recipe first")
    left = _KEPT if report else _KEPT | {_REPORT}
    entries = {e["path"]: e for e in manifest["files"] if e["path"] not in left}
    sizes = {name: int(entry["bytes"]) for name, entry in sorted(entries.items())}
    warnings = list(manifest["report"].get("warnings") or [])
    if not _NAME.fullmatch(repo):
        raise ConfigError(f"--repo {repo}: give ORG/NAME, the owner and the data set's name")
    if dry_run:
        return Upload(sizes, warnings, None)
    dataset = run.child(folder_of("emission"))
    for name, entry in entries.items():
        if dataset.sha256(name) != entry["sha256"]:
            raise StageError(
                f"{dataset.url}/{name} isn't the file that the run wrote; `tamis verify` lists "
                "such files, and --restart-from emission writes them again",
                stage="emission",
            )
    with tempfile.TemporaryDirectory() as scratch:
        folder = dataset.local_folder
        if folder is None:
            folder = scratch
            for name in entries:
                Store(scratch).write_bytes(name, dataset.read_bytes(name))
        return Upload(sizes, warnings, _uploaded(folder, sorted(entries), repo, private))


def _uploaded(folder: str, names: list[str], repo: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    options: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset"}
    # Failed connections are raised as the HTTP library has them, the base of the Hub's own errors.
    no_answer = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    try:
        made = api.create_repo(**options, private=private, exist_ok=True)
        api.upload_folder(
            **options,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=list(OWN_FILES),
            commit_message="Data set of a tamis run",
        )
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the Hub refused {repo}: {error}; check the name, and that HF_TOKEN (or `hf auth "
            "login`) gives a token that may write there"
        ) from error
    except (no_answer, OSError) as error:
        raise StageError(f"{repo} wasn't uploaded: {error}; try again", stage="emission") from error
    return str(made)
