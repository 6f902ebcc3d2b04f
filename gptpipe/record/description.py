"""What the record says about a run besides its metrics: parameters, tags, data, packages, changed code."""

import hashlib
import json
import os
import platform
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gptpipe.base.files import to_json
from gptpipe.base.manifest import Manifest
from gptpipe.base.params import PARAMS, Section
from gptpipe.record.store import MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, REPRODUCE
from gptpipe.shell.console import complain
from gptpipe.shell.environment import git, project_root, provenance

_MAX_NAMED_PARAMS = 6  # in the name of a run
_MAX_NAMED_CHARACTERS = 24  # of the value of one
_MAX_PATCH_BYTES = 1 << 20  # a larger patch contains data rather than code

# Names of files and folders that usually contain passwords, tokens or keys, in lower case.
_SECRET_NAMES = (
    # settings of an environment
    ".env*",
    "*.env",
    # certificates and keys
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.kdbx",
    "*.ppk",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    # anything named after a secret
    "*.token",
    "*credential*",
    "*password*",
    "secret*",
    "*_secret*",
    "*-secret*",
    # configuration files of common tools
    ".netrc",
    "_netrc",
    ".pgpass",
    ".my.cnf",
    ".htpasswd",
    ".npmrc",
    ".pypirc",
    "kubeconfig",
    "config.local",
    # folders
    ".ssh",
    ".aws",
    ".azure",
    ".gnupg",
    ".kube",
    ".docker",
)


def describe_run(
    params: Section, split: Manifest, environment: dict[str, Any], n_parameters: int
) -> dict[str, Any]:
    """The content of a `create` operation. `split` is the manifest of the split that the run uses, and
    `n_parameters` the size of its model.

    Secrets stay out: of the environment variables it contains only DVC's names of the experiment, and files
    that may contain secrets are left out.
    """
    patch, left_out = changed_code()
    changed = _changed_params()
    tags = _tags(params, environment, changed)
    if left_out:
        tags["left_out_of_code.patch"] = _shortened(", ".join(left_out), MAX_TAG_CHARACTERS)
    packages = {f"{package.name}=={package.version}\n" for package in distributions()}
    texts = {"environment.txt": "".join(sorted(packages)), "lineage.json": split.to_bytes().decode()}
    if patch is not None and len(patch) <= _MAX_PATCH_BYTES:
        texts[f"{REPRODUCE}/code.patch"] = patch
    all_values = _flat(params.model_dump(mode="json"))
    values, whole_values = _fit_params(all_values)
    texts |= whole_values
    return {
        "name": os.environ.get("DVC_EXP_NAME") or _run_name(all_values, changed, n_parameters),
        "tags": tags,
        "params": values,
        "datasets": [_dataset(split, side) for side in ("train", "val", "test")],
        "texts": texts,
    }


def _run_name(values: dict[str, str], changed: dict[str, str], n_parameters: int) -> str:
    """A name that describes a run: its network, and the parameters that differ from the commit.

    If none differs, learning rate and seed. A parameter is named by the last part of its key, and without its
    value if that is long.
    """
    shown = changed or {key: values[key] for key in ("train.lr", "seed")}
    settings = []
    for key, value in shown.items():
        short_key = key.rpartition(".")[2]
        settings.append(f"{short_key}={value}" if len(value) <= _MAX_NAMED_CHARACTERS else short_key)
    n_left_out = len(settings) - _MAX_NAMED_PARAMS
    if n_left_out > 0:
        settings[_MAX_NAMED_PARAMS:] = [f"and {n_left_out} more"]
    return " ".join([f"{values['model.architecture']}-{_rounded(n_parameters)}", *settings])


def _rounded(n: int) -> str:
    """A number of parameters as in names of models: 865K, 1.9M, 124M, 1.5B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            digits = 1 if n < 10 * size else 0
            return f"{n / size:.{digits}f}{unit}"
    return str(n)


def _fit_params(values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters, shortened to what MLflow takes, and the whole values of the shortened ones, by artifact."""
    fitting: dict[str, str] = {}
    artifacts: dict[str, str] = {}
    for key, value in values.items():
        fitting[key] = value
        if len(value) > MAX_PARAM_CHARACTERS:
            path = f"parameters/{key}.txt"
            artifacts[path] = value
            digest = hashlib.sha256(value.encode()).hexdigest()  # keeps different values different in MLflow
            note = (
                f"... [{len(value):,} characters, SHA-256 {digest}; the whole value is in the artifact {path}]"
            )
            fitting[key] = value[: MAX_PARAM_CHARACTERS - len(note)] + note
            complain(
                f"warning: {key} has {len(value):,} characters, MLflow takes {MAX_PARAM_CHARACTERS:,}; "
                f"the whole value is in the run's artifact {path}"
            )
    return fitting, artifacts


def _tags(params: Section, environment: dict[str, Any], changed: dict[str, str]) -> dict[str, str]:
    origin = provenance()
    if "mlflow.source.git.commit" not in origin and (project_root() / ".git").exists():
        complain(
            "warning: git does not answer, so the run is recorded without its code; "
            "`git status` gives the reason"
        )
    tags = {
        **origin,
        **{f"environment.{key}": str(value) for key, value in environment.items()},
        "params_digest": hashlib.sha256(to_json(params.model_dump(mode="json"))).hexdigest()[:12],
        "changed": _shortened(
            ", ".join(f"{key}={value}" for key, value in changed.items()), MAX_TAG_CHARACTERS
        ),
        "process": f"{os.getpid()} on {platform.node()}",
        "mlflow.loggedArtifacts": json.dumps([{"path": "samples.json", "type": "table"}]),
    }
    if "dvc.exp_name" in origin:  # the runs of a sweep change the same parameters of the same commit
        baseline = origin.get("dvc.baseline_rev", "")[:7]
        tags["sweep"] = _shortened(f"{baseline}: {', '.join(changed)}", MAX_TAG_CHARACTERS)
    return tags


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def dataset_digest(split: Manifest, side: str) -> str:
    """What identifies the tokens of one side in MLflow, which takes 36 characters."""
    return split.files[f"{side}/tokens.npy"].sha256[:36]


def _dataset(split: Manifest, side: str) -> dict[str, str]:
    """One side of the split as MLflow describes a data set."""
    counts = {what: split.counts[f"{side}_{what}"] for what in ("documents", "tokens", "bytes")}
    return {
        "name": f"split/{side}",
        "digest": dataset_digest(split, side),
        "source_type": "local",
        "source": f"data/split/{side}/tokens.npy",
        "profile": json.dumps(counts),
    }


def changed_code() -> tuple[str | None, list[str]]:
    """The differences from git's HEAD as a patch, and the files left out because they may contain secrets.

    The patch contains staged new files. A renamed file is left out if its old or its new name looks like that
    of a secret. The patch is None if git does not answer.
    """
    listed = git("diff", "--name-status", "-z", "-M", "HEAD", "--", ".")
    if listed is None:
        return None, []
    fields = iter(listed.split("\0"))
    secrets: set[str] = set()
    for status in filter(None, fields):
        n_names = 2 if status[0] in "RC" else 1  # renamed and copied files have an old and a new name
        names = [next(fields) for _ in range(n_names)]
        if any(map(may_hold_secrets, names)):
            secrets.update(names)
    excluded = [f":(top,literal,exclude){name}" for name in sorted(secrets)]
    diff = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-renames", "HEAD", "--")
    return git(*diff, ".", ":!dvc.lock", ":!reports", *excluded), sorted(secrets)


def may_hold_secrets(path: str) -> bool:
    """Whether a path looks like that of a secret.

    `.dvc/config` does, because it may contain a remote's password.
    """
    parts = path.lower().split("/")
    if parts[-2:] == [".dvc", "config"]:
        return True
    return any(fnmatchcase(part, pattern) for part in parts for pattern in _SECRET_NAMES)


def _changed_params() -> dict[str, str]:
    """Parameters that differ from the committed params.yaml: what this run tries."""
    committed = git("show", f"HEAD:./{PARAMS}")
    if committed is None or not PARAMS.exists():
        return {}
    yaml = YAML(typ="safe", pure=True)
    try:
        before = _flat(yaml.load(committed))
    except (YAMLError, AttributeError):  # the committed file is not valid
        return {}
    now = _flat(yaml.load(PARAMS.read_bytes()))
    return {key: value for key, value in now.items() if before.get(key) != value}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as `section.key` -> text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return flat
