"""Kinds of files, by name and by first bytes: which do not belong to a source, and which cannot be read."""

import re
from pathlib import PurePosixPath
from typing import Literal

Format = Literal["text", "jsonl", "parquet"]

HEAD_BYTES = 512  # of a file, enough for `document_kind` and `unreadable_kind`


def _endings(words: str) -> frozenset[str]:
    return frozenset(f".{word}" for word in words.split())


_COMPRESSED = _endings("bz2 gz lz4 lzma xz zst zstd")
_JSON = _endings("jl json jsonl ndjson")
_PARQUET = _endings("parq parquet pq")
_TEXT = _endings(
    "adoc asc bib c cc cfg conf cpp cs css csv diff go h hpp htm html ini ipynb java js lua md"
    " markdown nfo org patch php pl py r rb rs rst sh sql srt tex toml ts tsv txt vtt xhtml xml"
    " yaml yml"
)
_DOCUMENTS = _endings("doc docx epub key mobi numbers odp ods odt pages pdf ppt pptx rtf xls xlsx")
_BINARY = _endings(
    "a aac ai apk arrow avi avif bin bmp class crc db dll dylib eot exe feather flac gif h5"
    " hdf5 heic ico idx iso jpeg jpg lib m4a m4v md5 mkv mov mp3 mp4 mpg npy npz o obj ogg onnx"
    " otf pkl pickle png psd pt pth pyc pyd safetensors sha1 sha256 sha512 so sqlite sqlite3 svgz"
    " swf tfrecord tif tiff ttf wav wasm webm webp wmv woff woff2"
)
_OTHER: dict[Format, frozenset[str]] = {
    "text": _PARQUET | _BINARY,
    "jsonl": _PARQUET | _BINARY | _TEXT | _DOCUMENTS,
    "parquet": _JSON | _BINARY | _TEXT | _DOCUMENTS,
}
_ABOUT_DATA = re.compile(
    "(read_?me|licen[cs]e|copying|copyright|notice|authors|contributors|changelog|changes|citation|manifest|version"
    "|(md5|sha1|sha256|sha512)(sums?)?|checksums?|_success|_(common_)?metadata|makefile|dockerfile)",
    re.IGNORECASE,
)
_SYSTEM_FOLDERS = {
    "__macosx",
    ".git",
    ".svn",
    "@eadir",
    "$recycle.bin",
    ".fseventsd",
    ".spotlight-v100",
    ".trashes",
}
_SYSTEM_FILES = {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".localized", "icon\r", ".gitignore"}

# Formats that hold files or text, and that this project does not unpack: first bytes, name, what to do.
_UNREADABLE = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"MSCF\0\0\0\0", "a cabinet archive"),
    (b"\x1f\x9d", "compressed by compress (.Z)"),
    (b"\x1f\xa0", "compressed by compress -H"),
    (b"\x1f\x1e", "compressed by pack"),
    (b"LZIP\x01", "compressed by lzip"),
    (b"\x89LZO\0\r\n\x1a\n", "compressed by lzop"),
    (b"\x02\x21\x4c\x18", "compressed by an old version of LZ4"),
    (b"\xff\x06\0\0sNaPpY", "compressed by Snappy"),
    (b"\xff\x06\0\0S2sTwO", "compressed by S2"),
)
# Formats without a magic number, by the end of the name. Their content is not UTF-8.
_UNREADABLE_NAMES = {
    ".br": "compressed by Brotli",
    ".snappy": "compressed by Snappy",
    ".sz": "compressed by Snappy",
    ".zz": "compressed by zlib",
    ".deflate": "compressed by zlib",
}
_PDF = re.compile(rb"%PDF-\d\.\d[ \t\f\0]*[\r\n]\s*(%|\d+\s+\d+\s+obj)")  # a comment or an object follows
_RTF = b"{\\rtf1"
_OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def is_other_file(name: str, format_: Format) -> bool:
    """Whether a file found by a pattern or in an archive does not belong to a source of this format.

    True for files that systems and programs add (`__MACOSX/`, `a.jsonl.dvc`), for files about the data in a
    source that is not text (README, LICENSE), and for names that end like another format. Names of compressed
    files count without the end of the compression. A name without an end, or with an unknown one, is accepted.
    """
    if is_system_file(name):
        return True
    path = PurePosixPath(name.lower().rstrip(". "))
    if path.suffix in _COMPRESSED:
        path = path.with_suffix("")
    if path.suffix in _OTHER[format_]:
        return True
    return format_ != "text" and path.suffix == "" and _ABOUT_DATA.fullmatch(path.name) is not None


def is_system_file(name: str) -> bool:
    """Whether an operating system, an editor, DVC or another program added the file."""
    *folders, last = name.lower().replace("\\", "/").split("/")
    return (
        not _SYSTEM_FOLDERS.isdisjoint(folders)
        or last in _SYSTEM_FILES
        or last.startswith(("._", "~$", ".~lock."))
        or last.endswith(("~", ".dvc"))
    )


def document_kind(head: bytes) -> str | None:
    """What a document is that contains text in a form other than plain text; None for other files."""
    if _PDF.match(head):
        return "a PDF document"
    if head.startswith(_RTF):
        return "an RTF document"
    return "an old Office document" if head.startswith(_OLD_OFFICE) else None


def unreadable_kind(name: str, head: bytes) -> str | None:
    """The kind of archive or compression that cannot be read, for a file with this `head`; else None."""
    if is_text(head):
        return None
    for magic, kind in _UNREADABLE:
        if head.startswith(magic):
            return kind
    return _UNREADABLE_NAMES.get(PurePosixPath(name.lower()).suffix)


def is_text(head: bytes) -> bool:
    """Whether a file that starts with `head` is text in UTF-8, whose last character may be cut off here.

    A text may start with a magic number, as in "BZh91AY&SY is how a bzip2 file starts".
    """
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.end == len(head) and error.reason == "unexpected end of data"
    return b"\0" not in head
