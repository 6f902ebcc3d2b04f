"""Tar and zip archives in memory, for tests of reading."""

import io
import tarfile
import zipfile


def tar(members: dict[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive with these members: content by name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The same as `tar`, each member packed with `method`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()
