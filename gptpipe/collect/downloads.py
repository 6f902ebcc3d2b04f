"""Downloads: resumed when interrupted, checked against the SHA-256 in params.yaml, kept for the next run."""

import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

from gptpipe.base.files import new_file, sha256_of
from gptpipe.collect.tables import CHUNK
from gptpipe.shell.environment import project_root
from gptpipe.shell.errors import InputError, IntegrityError, ResourceError, first_line
from gptpipe.shell.locks import disk_errors

_TRIES = 5
_PAUSE = 1.0  # seconds before the second try; doubled before each later one
_TIMEOUT = 30.0  # seconds without receiving a byte
_SPARE_BYTES = 1 << 30  # of the disk that downloads leave free


def download(url: str, sha256: str) -> Path:
    """The path of the file in the project's `.gptpipe/downloads`. Downloads it if it is not there; waits while
    another run does.

    Raises InputError if the server refuses, ResourceError after five tries, IntegrityError for other content.
    """
    target = project_root() / ".gptpipe" / "downloads" / sha256
    if not _is_kept(target, sha256):
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(target.with_suffix(".lock")).acquire()
        with lock:
            if not _is_kept(target, sha256):
                _download(url, sha256, target)
    return target


def _is_kept(target: Path, sha256: str) -> bool:
    return target.is_file() and sha256_of(target) == sha256


def _download(url: str, sha256: str, target: Path) -> None:
    part = target.with_suffix(".part")
    for attempt in range(_TRIES):
        problem = _try_download(url, part)
        if not problem:
            break
        if attempt < _TRIES - 1:
            time.sleep(_PAUSE * 2**attempt)
    else:
        raise ResourceError(f"{url}: {problem}, in {_TRIES} tries; rerun to resume the download")
    actual = sha256_of(part)
    if actual == sha256:
        with part.open("rb") as source, new_file(target) as file:
            shutil.copyfileobj(source, file, CHUNK)
    part.unlink()
    if actual != sha256:
        raise IntegrityError(f"{url}: SHA-256 is {actual}, collect.sources names {sha256}; fix the wrong one")


def _try_download(url: str, part: Path) -> str:
    """Why the file is not complete after this try, or "". Raises InputError if another try cannot help."""
    try:
        return "the answer is cut short" if _fetch(url, part) else ""
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url}: not an address: {first_line(error)}; fix it in collect.sources") from error
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # no such range: the part is already complete, or its SHA-256 is wrong
            return ""
        if error.code < 500 and error.code not in (408, 429):
            raise InputError(f"{url}: {first_line(error)}; fix the address in collect.sources") from error
        return first_line(error)
    except (OSError, http.client.HTTPException) as error:
        return first_line(error)


def _fetch(url: str, part: Path) -> int:
    """Append the missing bytes to `part`; return how many are still missing."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, part.open("ab") as file:
        if not isinstance(answer, http.client.HTTPResponse):
            raise InputError(
                f"{url}: redirects to {answer.url}, which is not HTTP; fix the address in collect.sources"
            )
        if answer.status != 206:  # the server sends the whole file
            file.truncate(0)
        while data := answer.read(CHUNK):
            disk = shutil.disk_usage(part.parent)
            if disk.free < min(_SPARE_BYTES, disk.total // 20):  # the answer may be endless
                problem = f"{file.tell():,} bytes so far in {part}, and the disk is nearly full"
                raise ResourceError(
                    f"{url}: {problem}; free space, or fix the address in collect.sources, then rerun"
                )
            with disk_errors(part):
                file.write(data)
                file.flush()
        return answer.length or 0
