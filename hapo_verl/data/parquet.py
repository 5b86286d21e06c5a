"""Reads and writes parquet files with rows for verl."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Raised for input that a data tool cannot use; the message is one line: what, the rule, the fix."""


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a parquet file as plain mappings, lists and numbers.

    Raises:
        DataError: if the file is missing, is not parquet, or is damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not path.is_file():
        raise DataError(f"{path}: no such file. Name a local parquet file.")
    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a parquet file ({_first_line(error)}). Name a parquet file.") from None
    batches = file.iter_batches(batch_size=1024)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: damaged ({_first_line(error)}). Write the file again.") from None
        yield from rows


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a parquet file atomically, so that no reader sees half of it.

    Raises:
        DataError: if there is no row, or a parquet file cannot hold a value.
    """
    import pandas
    import pyarrow

    if not rows:
        raise DataError(f"{path}: no row is left to write. See the reasons above.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pandas.DataFrame(rows).to_parquet(temporary)
        temporary.replace(path)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise DataError(f"{path}: cannot be written ({_first_line(error)}). A column has one type.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, UnicodeError) or not error.args else str(error)
    return next((line for line in str(error).splitlines() if line.strip()), str(text)).strip()
