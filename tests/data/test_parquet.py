"""Parquet files: written atomically, read as plain values, and one line for an unreadable file."""

import pandas
import pytest

from hapo_verl.config import ConfigError
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet
from hapo_verl.launch.files import _column_kinds


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1?"}], "extra_info": {"index": 3}, "demonstration": "1"}] * 2
    write_parquet(rows, tmp_path / "deep" / "train.parquet")
    assert list(read_parquet(tmp_path / "deep" / "train.parquet")) == rows


def test_a_file_that_is_not_parquet_is_refused_in_one_line(tmp_path):
    path = tmp_path / "train.parquet"
    with pytest.raises(DataError) as error:
        list(read_parquet(path))
    assert str(error.value) == f"{path}: no such file. Name a local parquet file."
    path.write_text("prompt,target")
    with pytest.raises(DataError, match=r"not a parquet file \(.*\)\. Name a parquet file\.$"):
        list(read_parquet(path))


@pytest.mark.parametrize(("place", "text"), [(10, "damaged \\("), (-5, "not a parquet file \\(")])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, place, text):
    path = tmp_path / "train.parquet"
    write_parquet([{"prompt": [{"role": "user", "content": "1?"}], "demonstration": "1"}] * 3, path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=text) as error:
        list(read_parquet(path))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["x", "\ud800", 10**400, [1]])
def test_a_value_that_parquet_cannot_hold_is_refused_in_one_line_and_leaves_no_file(tmp_path, value):
    with pytest.raises(DataError, match=r"cannot be written \(.*\)\. A column has one type\.$") as error:
        write_parquet([{"a": 1}, {"a": value}], tmp_path / "out.parquet")
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_writing_no_rows_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(DataError, match="no row is left to write"):
        write_parquet([], tmp_path / "train.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    write_parquet([{"a": 1}], path)

    def full_disk(frame, target):
        target.write_bytes(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_parquet([{"a": 2}], path)
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
    assert pandas.read_parquet(path)["a"].tolist() == [1]


def test_a_file_with_any_byte_flipped_is_read_or_refused_in_one_line(tmp_path):
    path, damaged = tmp_path / "whole.parquet", tmp_path / "damaged.parquet"
    write_parquet([{"prompt": [{"role": "user", "content": "1?"}], "demonstration": "1"}] * 3, path)
    whole, lines = path.read_bytes(), []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 0xFF
        damaged.write_bytes(content)
        for read in (lambda: list(read_parquet(damaged)), lambda: _column_kinds(damaged)):
            try:
                read()
            except (DataError, ConfigError) as error:
                lines.append(str(error).splitlines())
    assert len(lines) > 100
    assert all(len(line) == 1 for line in lines)
