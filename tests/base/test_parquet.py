"""Parquet shards: the rows that were written, or an error; at most one row group in memory."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptpipe.base import parquet
from gptpipe.base.manifest import new_folder, verify
from gptpipe.base.parquet import new_parquet, read_parquet, verify_rows
from gptpipe.shell.errors import IntegrityError

SCHEMA = pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.uint16()))])
ROWS = [{"id": f"{i:x}", "tokens": [i * j % 999 for j in range(i % 9)]} for i in range(2000)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with new_parquet(path, SCHEMA) as file:
        for row in rows:
            file.extend(pa.RecordBatch.from_pylist([row], SCHEMA))


def read(path: Path) -> list[dict[str, Any]]:
    return [row for batch in read_parquet(path, ["id", "tokens"]) for row in batch.to_pylist()]


def test_rows_are_read_in_the_written_order(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", ROWS)
    assert read(tmp_path / "rows.parquet") == ROWS
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == ROWS


def test_a_file_without_rows_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", [])
    assert read(tmp_path / "rows.parquet") == []


def test_row_groups_and_batches_are_limited_by_rows_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 7)
    write(tmp_path / "rows", ROWS[:20])
    assert [batch.num_rows for batch in read_parquet(tmp_path / "rows", ["id"])] == [7, 7, 6]
    size = pa.RecordBatch.from_pylist(ROWS[:1], SCHEMA).nbytes
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 3 * size)
    write(tmp_path / "rows", ROWS[:1] * 20)
    assert [batch.num_rows for batch in read_parquet(tmp_path / "rows", ["id"])] == [3, 3, 3, 3, 3, 3, 2]


def test_every_flipped_bit_in_a_page_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write(path, ROWS)
    content = path.read_bytes()
    end_of_pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    random_ = random.Random(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random_.randrange(end_of_pages)] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read(path) == ROWS
        except IntegrityError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{path}: damaged") for message in messages)
    assert len(messages) > 250  # the other bits are never read, such as unused header fields


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"text"])
def test_a_file_that_is_not_parquet_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"rows\.parquet: damaged"):
        read(tmp_path / "rows.parquet")


def test_a_missing_file_a_missing_column_and_a_truncated_file_are_integrity_errors(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(IntegrityError, match=r"rows\.parquet: damaged"):
        read(path)
    write(path, ROWS)
    with pytest.raises(IntegrityError, match="no column text"):
        list(read_parquet(path, ["id", "text"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"rows\.parquet: damaged"):
        read(path)


@pytest.mark.parametrize("counted", [{"documents": 5}, {"documents": "2"}, {}])
def test_rows_that_the_manifest_does_not_count_are_detected(tmp_path: Path, counted: dict[str, object]) -> None:
    """Two writers once left a folder that could be verified but had the rows of only one of them."""

    def build(counts: dict[str, object]) -> None:
        with new_folder(tmp_path / "raw", {}) as folder:
            for name in ("docs-0.parquet", "docs-1.parquet"):
                with new_parquet(folder.path / name, SCHEMA) as file:
                    file.extend(pa.RecordBatch.from_pylist(ROWS[:1], SCHEMA))
            folder.counts = counts

    build({"documents": 2})
    assert verify_rows(tmp_path / "raw", {"docs-*.parquet": "documents"}).counts == {"documents": 2}
    build(counted)
    verify(tmp_path / "raw")
    with pytest.raises(IntegrityError, match=r"raw/docs-\*\.parquet: 2 rows, the manifest counts"):
        verify_rows(tmp_path / "raw", {"docs-*.parquet": "documents"})
