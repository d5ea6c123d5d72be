"""Small parquet files as bytes: the index, the plan, the ledger and the table of samples.

In:   an Arrow table; or bytes.
Out:  bytes, the same for the same table and version of pyarrow; or the file's schema and some of its columns.
Cost: one thread.
Errors: pyarrow.ArrowException or OSError for bytes that are damaged; page checksums are verified.

Not `pyarrow.parquet.read_table`: its threads may still hold the bytes when the interpreter ends, and then abort the
process (seen once in fifteen runs of a command that ended right after reading).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def to_bytes(table: pa.Table) -> bytes:
    """The table as a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def from_bytes(data: bytes, columns: Sequence[str] | None = None) -> tuple[pa.Schema, pa.Table]:
    """The schema of a whole file, with its metadata, and these of its columns (None: all)."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    return file.schema_arrow, file.read(columns=columns, use_threads=False)
