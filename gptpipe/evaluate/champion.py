"""What the report says about the champion: the difference of the two models, both curves, and what changed."""

import hashlib
import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from gptpipe.base.files import unseal
from gptpipe.base.manifest import Manifest, read_manifest
from gptpipe.base.params import PARAMS, Section
from gptpipe.evaluate.charts import Line, line_chart
from gptpipe.evaluate.document_scores import Difference, paired_difference
from gptpipe.evaluate.evaluate import Evaluation
from gptpipe.evaluate.registry import CHAMPION, MODEL_DIGEST, MODEL_NAME, champion_version, scores_of_version
from gptpipe.record.description import describe_run
from gptpipe.record.store import REPRODUCE, StoreError, connect, find_run, store_errors
from gptpipe.shell.environment import git
from gptpipe.shell.errors import IntegrityError, first_line

_MAX_CHARACTERS = 200  # shown of a parameter's value
_MAX_FILES = 12  # of changed code, shown by name
_DIGITS = 12  # shown of a digest
# Changes of these are no changes of code: parameters are compared by value, and the rest is made by runs.
_NOT_CODE = (str(PARAMS), "dvc.lock", "reports/")

Row = tuple[str, str, str]  # name, the champion's value, this run's value


@dataclass(frozen=True)
class Comparison:
    """The comparison of a model with the champion. If there is nothing to compare, it has only a headline."""

    headline: str
    differences: list[str] = field(default_factory=list)  # a sentence for each side of the split
    loss_chart: str = ""  # SVG
    params: list[Row] = field(default_factory=list)  # those that differ
    data: list[Row] = field(default_factory=list)  # digests that differ
    code: list[str] = field(default_factory=list)  # sentences


@dataclass(frozen=True)
class _Facts:
    """What the record says about the origin of a run."""

    params: dict[str, str]
    commit: str | None
    patch: str | None  # the difference from the commit; None if it is not recorded
    data: dict[str, str]  # name -> digest of the split and all its ancestors


def compare_with_champion(
    params: Section, evaluation: Evaluation, run_id: str, curves: dict[str, Line], model: Path
) -> Comparison:
    """Compare a run with the champion before it is registered; `curves` are its losses, train and val.

    If the store fails, the headline says so.
    """
    try:
        with store_errors(), tempfile.TemporaryDirectory() as folder:
            client = connect()
            version = champion_version(client)
            if version is None:
                return Comparison(f"There is no {CHAMPION} yet to compare with.")
            name = f"{MODEL_NAME} version {version.version}"
            if version.tags.get(MODEL_DIGEST) == read_manifest(model).digest:
                return Comparison(f"This model is the {CHAMPION}, {name}.")
            ours = _facts_of(client, run_id, Path(folder, "ours"))
            if ours is None:
                description = describe_run(params, evaluation.split, {}, evaluation.n_parameters)
                ours = _facts_in(description, evaluation.split)
            champion_run = version.run_id or ""  # a version that a user registered has none
            theirs = _facts_of(client, champion_run, Path(folder, "theirs"))
            differences = _differences(client, version, evaluation.documents, Path(folder))
            headline = f"The {CHAMPION} before this evaluation is {name}, of run {champion_run or 'unknown'}."
            if theirs is None:
                return Comparison(f"{headline} The store does not know this run.", differences)
            return Comparison(
                headline,
                differences,
                _loss_chart(curves, _curves_of(client, champion_run)),
                _differing(theirs.params, ours.params, _MAX_CHARACTERS),
                _differing(theirs.data, ours.data, _DIGITS),
                _code_changes(theirs, ours),
            )
    except StoreError as error:
        return Comparison(f"Not compared with the {CHAMPION}: {error}")


def _differences(
    client: MlflowClient, version: ModelVersion, documents: pd.DataFrame, folder: Path
) -> list[str]:
    """A sentence for each side, or one that says why the scores cannot be compared."""
    try:
        of_champion = scores_of_version(client, version, folder)
    except (IntegrityError, OSError, MlflowException) as error:
        return [f"The scores of its documents cannot be read: {first_line(error).split('; ')[0]}."]
    sentences = []
    for side in ("test", "val"):
        difference = paired_difference(documents, of_champion, side)
        if difference is not None:
            sentences.append(f"On {side}: {difference}; {_in_words(difference)}.")
        elif side in set(documents["split"]):
            sentences.append(
                f"On {side}: not comparable, because the {CHAMPION} was scored on other documents."
            )
    return sentences


def _in_words(difference: Difference) -> str:
    if difference.n_documents < 2:
        return "the error of a single document is unknown"
    if abs(difference.bits_per_byte) <= 2 * difference.standard_error:
        return "within two standard errors, so it may be chance"
    better_or_worse = "better" if difference.bits_per_byte < 0 else "worse"
    return f"{better_or_worse} than the {CHAMPION} by more than two standard errors"


def _facts_of(client: MlflowClient, run_id: str, folder: Path) -> _Facts | None:
    """The facts in the record of a run; None if the store does not have it. `folder` is for temporary files."""
    known_id = find_run(client, run_id)
    if known_id is None:
        return None
    data = client.get_run(known_id).data
    lineage = _artifact(client, known_id, "lineage.json", folder)
    patch = _artifact(client, known_id, f"{REPRODUCE}/code.patch", folder)
    return _Facts(data.params, data.tags.get("mlflow.source.git.commit"), patch, _ancestors(lineage))


def _facts_in(description: dict[str, Any], split: Manifest) -> _Facts:
    """The same of a run that the store does not have yet."""
    patch = description["texts"].get(f"{REPRODUCE}/code.patch")
    commit = description["tags"].get("mlflow.source.git.commit")
    return _Facts(description["params"], commit, patch, split.lineage("split"))


def _artifact(client: MlflowClient, run_id: str, path: str, folder: Path) -> str | None:
    """The text of an artifact; None if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(client.download_artifacts(run_id, path, str(folder))).read_bytes().decode(errors="replace")
    except (MlflowException, OSError):
        return None


def _ancestors(lineage: str | None) -> dict[str, str]:
    """The digests in lineage.json, the manifest of a split; none if it is missing or damaged."""
    try:
        return Manifest.model_validate(unseal((lineage or "").encode())).lineage("split")
    except ValueError:  # pydantic's too
        return {}


def _differing(theirs: dict[str, str], ours: dict[str, str], n_characters: int) -> list[Row]:
    """The entries that differ, shortened to a number of characters."""
    return [
        (name, theirs.get(name, "none")[:n_characters], ours.get(name, "none")[:n_characters])
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


def _code_changes(theirs: _Facts, ours: _Facts) -> list[str]:
    """Sentences on the code of two runs."""
    if theirs.commit is None or ours.commit is None:
        return ["The commit of one of the runs is not recorded."]
    same = theirs.commit == ours.commit
    commits = (
        f"Both runs are of commit {ours.commit[:_DIGITS]}."
        if same
        else f"This run is of commit {ours.commit[:_DIGITS]}, the {CHAMPION} of {theirs.commit[:_DIGITS]}."
    )
    if theirs.patch is None or ours.patch is None:
        return [commits, "Uncommitted changes of one of the runs are not recorded."]
    listed = "" if same else git("diff", "--name-only", theirs.commit, ours.commit, "--")
    if listed is None:
        return [commits, "Git does not know one of the commits here."]
    theirs_by_file, ours_by_file = _changes_by_file(theirs.patch), _changes_by_file(ours.patch)
    uncommitted = {
        name
        for name in theirs_by_file.keys() | ours_by_file.keys()
        if theirs_by_file.get(name) != ours_by_file.get(name)
    }
    names = {*listed.splitlines(), *uncommitted}
    files = sorted(name for name in names if not name.startswith(_NOT_CODE))
    if not files:
        return [commits, "No file of code differs."]
    more = f" and {len(files) - _MAX_FILES} more" if len(files) > _MAX_FILES else ""
    return [commits, f"Files that differ: {', '.join(files[:_MAX_FILES])}{more}."]


def _changes_by_file(patch: str) -> dict[str, str]:
    """The digest of the changes of each file in a patch of git."""
    sections = re.split(r"^diff --git a/.* b/(.*)$", patch, flags=re.MULTILINE)[1:]
    return {
        name: hashlib.sha256(section.encode()).hexdigest()
        for name, section in zip(sections[::2], sections[1::2], strict=True)
    }


def _curves_of(client: MlflowClient, run_id: str) -> dict[str, Line]:
    """The losses of a run in the store, train and val."""
    curves: dict[str, Line] = {}
    for name in ("train", "val"):
        points = sorted(
            (point.step, point.value) for point in client.get_metric_history(run_id, f"{name}/loss")
        )
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        curves[name] = ([step for step, _ in finite], [value for _, value in finite])
    return curves


def _loss_chart(ours: dict[str, Line], theirs: dict[str, Line]) -> str:
    lines = {f"{name}, this run": ours[name] for name in ours}
    lines |= {f"{name}, {CHAMPION}": theirs[name] for name in theirs}
    return line_chart("step", "nats per token", lines)
