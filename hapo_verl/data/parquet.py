"""Parquet files of verl's rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Input that cannot be read; the message is one line: what, the rule, the fix."""


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, as plain mappings, lists and numbers.

    Raises:
        DataError: when the file is missing or is not parquet.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise DataError(f"{path}: no such file. Name a local parquet file.")
    try:
        file = ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0]}). Name a parquet file.") from None
    for batch in file.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a parquet file in one step: no reader ever sees half of it.

    Raises:
        DataError: when there is nothing to write.
    """
    import pandas

    if not rows:
        raise DataError(f"{path}: no row is left to write. See the reasons above.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pandas.DataFrame(rows).to_parquet(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
