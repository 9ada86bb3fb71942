"""Read Parquet files. The package pyarrow is optional."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from upright.errors import UserError, one_line


def read_parquet(file: Path, read: Callable[[Any], Any], advice: str = "") -> Any:
    """Return ``read(pyarrow.parquet)``, or raise a `UserError`: the file is broken, or the package missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"'{file}' needs the package 'pyarrow': pip install 'upright[parquet]'{advice}.") from None
    try:
        return read(pyarrow.parquet)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"'{file}' cannot be read as Parquet: {one_line(error, 200)}") from None


def read_columns(file: Path, names: list[str]) -> Any:
    """Return these columns of a file, a ``pyarrow.Table``. Names of folders are no columns."""
    return read_parquet(file, lambda pq: pq.read_table(file, columns=names, partitioning=None))
