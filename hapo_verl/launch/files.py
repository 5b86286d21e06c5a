"""The files that a launch names: they are there, and have the columns that verl and HAPO read.

Only names and schemas are looked at. What other machines hold (`hdfs://`, a model of the Hugging Face hub) and a data
set class of the user's own are left to verl.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from hapo_verl.config import ConfigError, HapoConfig


class MissingFileError(ConfigError):
    """A file that is not on this machine; where the trainer runs on another one, it may be there."""


_MODEL = "actor_rollout_ref.model.path"
_REWARD = "reward.custom_reward_function.path"
_KINDS = (".parquet", ".json", ".jsonl")


def check_files(config: DictConfig, hapo: HapoConfig) -> None:
    """Raise `ConfigError` where a file is missing, or lacks a column."""
    check_columns(config, hapo)
    _check_model(str(OmegaConf.select(config, _MODEL)))
    reward = OmegaConf.select(config, _REWARD)
    if reward and not str(reward).startswith("pkg://") and not Path(str(reward).removeprefix("file://")).is_file():
        raise MissingFileError(
            f"{_REWARD}={reward}: no such file on this machine. Name a Python file, or leave it null for verl's own."
        )


def check_columns(config: DictConfig, hapo: HapoConfig) -> str:
    """The columns that were found, in one line.

    Raises:
        ConfigError: where a file of the data set is missing, or lacks one of them.
    """
    if OmegaConf.select(config, "data.custom_cls.path"):
        return "not checked: data.custom_cls reads the files"
    needed = {str(OmegaConf.select(config, "data.prompt_key"))}
    if OmegaConf.select(config, "reward.reward_manager.source") == "register":
        # verl's own reward managers read them.
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
    """The files of `data.<key>` that lie on this machine.

    Raises:
        ConfigError: where one is missing, or of a kind that verl does not read.
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
    """Column → text, null, or anything else by its type's name."""
    import pyarrow
    from pyarrow.parquet import read_schema

    try:
        schema = read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
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
