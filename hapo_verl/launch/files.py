"""Checks that the files of a launch exist and have the columns that verl and HAPO read.

Only file names and schemas are checked. Remote files (`hdfs://`, a model on the Hugging Face hub) and files read by a
user's own data set class are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from hapo_verl.config import ConfigError, HapoConfig


class MissingFileError(ConfigError):
    """Raised for a file that is not on this machine; if the trainer runs on another machine, it may exist there."""


_MODEL = "actor_rollout_ref.model.path"
_REWARD = "reward.custom_reward_function.path"
_KINDS = (".parquet", ".json", ".jsonl")


def check_files(config: DictConfig, hapo: HapoConfig) -> None:
    """Raise `ConfigError` if a file is missing or lacks a column."""
    check_columns(config, hapo)
    _check_model(str(OmegaConf.select(config, _MODEL)))
    reward = OmegaConf.select(config, _REWARD)
    if reward and not str(reward).startswith("pkg://") and not Path(str(reward).removeprefix("file://")).is_file():
        raise MissingFileError(
            f"{_REWARD}={reward}: no such file on this machine. Name a Python file, or leave it null for verl's own."
        )


def check_columns(config: DictConfig, hapo: HapoConfig) -> str:
    """Check the columns of the data files and describe them in one line.

    Raises:
        ConfigError: if a file is missing, lacks a column, or has demonstrations of another type than the other files.
    """
    if OmegaConf.select(config, "data.custom_cls.path"):
        return "not checked: data.custom_cls reads the files"
    needed = {str(OmegaConf.select(config, "data.prompt_key"))}
    if OmegaConf.select(config, "reward.reward_manager.source") == "register":
        # verl's own reward managers read these two columns.
        needed |= {"data_source", "reward_model"}
    looked_at, kinds, demonstrations = 0, {}, hapo.demonstration_key
    of_training = needed | {demonstrations} if hapo.demonstrations.needs_column else needed
    for key, columns in {"train_files": of_training, "val_files": needed}.items():
        for file in local_files(config, key):
            if file.suffix != ".parquet":
                continue
            found = _column_kinds(file)
            missing = columns - set(found)
            if missing:
                raise ConfigError(f"data.{key}={file}: no column {', '.join(sorted(missing))}. Add it.")
            if key == "train_files" and found.get(demonstrations, "null") != "null":
                kinds[found[demonstrations]] = file
            looked_at += 1
    if len(kinds) > 1:
        which = ", ".join(f"{kind} in {file}" for kind, file in kinds.items())
        raise ConfigError(
            f"hapo.demonstration_key={demonstrations}: {which}, and verl reads all files as one table. "
            "Write the column in one type."
        )
    in_training = f", {demonstrations} in those to train on" if hapo.demonstrations.needs_column else ""
    return f"{', '.join(sorted(needed))} in {looked_at} file(s){in_training}"


def local_files(config: DictConfig, key: str) -> list[Path]:
    """The files of `data.<key>` on this machine; remote files are left out.

    Raises:
        ConfigError: if a file is missing, or verl cannot read its type.
    """
    return list(_local_files(OmegaConf.select(config, f"data.{key}"), f"data.{key}"))


def _local_files(given: Any, key: str) -> Iterator[Path]:
    files = list(given) if isinstance(given, list | tuple | ListConfig) else [given]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{key}={given}: a file, or a list of files, is needed. Name local parquet files.")
    for file in files:
        if "://" in file:
            continue
        if not Path(file).expanduser().is_file():
            raise MissingFileError(f"{key}={file}: no such file on this machine. Name local parquet files.")
        if not file.endswith(_KINDS):
            raise ConfigError(f"{key}={file}: verl reads {', '.join(_KINDS)} by a file's name. Name parquet files.")
        yield Path(file).expanduser()


def _column_kinds(file: Path) -> dict[str, str]:
    """The type of each column: `text` for strings, else the name of its Arrow type, such as `null` or `list`."""
    import pyarrow
    from pyarrow.parquet import read_schema

    try:
        schema = read_schema(file)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{file}: cannot be read ({first_line}). Name parquet files.") from None

    def kind(of: Any) -> str:
        if pyarrow.types.is_string(of) or pyarrow.types.is_large_string(of):
            return "text"
        return str(of).partition("<")[0]

    return {field.name: kind(field.type) for field in schema}


def _check_model(path: str) -> None:
    if "://" in path:
        return
    if path.endswith("/"):
        raise ConfigError(f"{_MODEL}={path}: verl refuses a path with a slash at its end. Leave it out.")
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{_MODEL}={path}: this folder has no config.json. Name a model's folder.")
    elif path.startswith(("/", "~", ".")) or path.count("/") != 1:
        tilde = " (a leading ~ is not expanded)" if path.startswith("~") else ""
        raise MissingFileError(
            f"{_MODEL}={path}: no such folder on this machine{tilde}. Name one, or a model of the Hugging Face hub as "
            "owner/name."
        )
