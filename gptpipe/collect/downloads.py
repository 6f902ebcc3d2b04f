"""Downloads: resumed where they broke off, checked against the SHA-256 that the user names, kept for the next time."""

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
_PAUSE = 1.0  # seconds before the second try, doubled before each further one
_TIMEOUT = 30.0  # seconds without a byte
_SPARE_BYTES = 1 << 30  # of the disk, never used for downloads


def download(url: str, sha256: str) -> Path:
    """The file in the project's `.gptpipe/downloads`, fetched unless it is there, or another run is fetching it.

    Raises InputError where the server refuses, ResourceError after five tries, IntegrityError for another content.
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
        reason = "the answer is cut short"
        try:
            missing = _fetch(url, part) > 0
        except (ValueError, http.client.InvalidURL) as error:
            raise InputError(f"{url}: not an address: {first_line(error)}; fix it in collect.sources") from error
        except (OSError, http.client.HTTPException) as error:
            code = 500
            if isinstance(error, urllib.error.HTTPError):
                code = error.code
                error.close()
            if code < 500 and code not in (408, 416, 429):  # 416: the part is the whole already, or worth nothing
                raise InputError(f"{url}: {first_line(error)}; mend the address in collect.sources") from error
            missing, reason = code != 416, first_line(error)
        if not missing:
            break
        if attempt < _TRIES - 1:
            time.sleep(_PAUSE * 2**attempt)
    else:
        raise ResourceError(f"{url}: {reason}, in {_TRIES} tries; rerun to go on where it broke off")
    found = sha256_of(part)
    if found == sha256:
        with part.open("rb") as source, new_file(target) as file:
            shutil.copyfileobj(source, file, CHUNK)
    part.unlink()
    if found != sha256:
        raise IntegrityError(f"{url}: SHA-256 is {found}, collect.sources names {sha256}; mend one of the two")


def _fetch(url: str, part: Path) -> int:
    """Append to `part` what it lacks; how many bytes are missing still."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer, part.open("ab") as file:
        if not isinstance(answer, http.client.HTTPResponse):
            raise InputError(f"{url}: redirects to {answer.url}, which is not HTTP; fix the address in collect.sources")
        if answer.status != 206:
            file.truncate(0)
        while data := answer.read(CHUNK):
            disk = shutil.disk_usage(part.parent)
            if disk.free < min(_SPARE_BYTES, disk.total // 20):  # the answer may have no end
                reason = f"{file.tell():,} bytes so far in {part}, and the disk is nearly full"
                raise ResourceError(f"{url}: {reason}; free space, or fix the address in collect.sources, then rerun")
            with disk_errors(part):
                file.write(data)
                file.flush()
        return answer.length or 0
