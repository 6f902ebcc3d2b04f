"""Reading reports/split.json: how many documents of each side share text with train, as stage split found."""

import json
from pathlib import Path
from typing import NamedTuple

from gptpipe.shell.errors import IntegrityError


class Overlap(NamedTuple):
    """Contamination of one side of the split, or of a benchmark, by train."""

    share: float | None  # of the examined documents; None if there are none
    n_examined: int


def read_overlaps(path: Path) -> dict[str, Overlap]:
    """Side or benchmark -> its overlap; empty before stage split. Raises IntegrityError."""
    try:
        report = json.loads(path.read_bytes())
        return {
            name: Overlap(None if share is None else float(share), int(report[f"{name}_examined"]))
            for name, share in sorted(report["share"].items())
            if name != "train"
        }
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; `dvc repro` restores it") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: damaged, not a report of stage split; `dvc repro` restores it"
        ) from error
