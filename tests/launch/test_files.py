"""If files of a launch are missing or lack columns, it stops with one line before anything is started."""

import pyarrow
import pyarrow.parquet
import pytest

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.launch.files import MissingFileError, check_files

ROW = {
    "prompt": [{"role": "user", "content": "1?"}],
    "data_source": "x",
    "reward_model": {"ground_truth": "1"},
    "demonstration": "1",
}


def write(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write(tmp_path / "train.parquet", ROW)
    write(tmp_path / "val.parquet", {name: value for name, value in ROW.items() if name != "demonstration"})
    return tmp_path


@pytest.fixture
def check(folder, launch):
    def run(*overrides):
        given = [override.format(folder=folder) for override in overrides]
        config = launch(
            f"data.train_files={folder}/train.parquet",
            f"data.val_files={folder}/val.parquet",
            f"actor_rollout_ref.model.path={folder}/model",
            *given,
        )
        check_files(config, HapoConfig.parse(config.hapo))

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.train_files=[{folder}/train.parquet,{folder}/train.parquet]",),
        ("data.train_files=[hdfs://host/train.parquet]", "data.val_files=s3://bucket/val.parquet"),
        ("actor_rollout_ref.model.path=Qwen/Qwen2.5-7B",),
        ("actor_rollout_ref.model.path=hdfs://host/model",),
        ("data.custom_cls.path=mine.py", "data.train_files=no.parquet"),
        ("reward.custom_reward_function.path=pkg://my.reward",),
        # This file has no demonstrations.
        ("hapo.demonstrations.source=own", "data.train_files={folder}/val.parquet"),
        ("reward.custom_reward_function.path={folder}/model/config.json",),
    ],
)
def test_a_launch_with_its_files_passes_and_remote_files_are_left_to_verl(check, overrides):
    check(*overrides)


@pytest.mark.parametrize(
    ("override", "message", "kind"),
    [
        (
            "data.train_files={folder}/no.parquet",
            "data.train_files={folder}/no.parquet: no such file on this machine. Name local parquet files.",
            MissingFileError,
        ),
        (
            "data.val_files=[{folder}/val.parquet,no.parquet]",
            "data.val_files=no.parquet: no such file on this machine. Name local parquet files.",
            MissingFileError,
        ),
        (
            "data.val_files=null",
            "data.val_files=None: a file, or a list of files, is needed. Name local parquet files.",
            ConfigError,
        ),
        (
            "data.train_files={folder}/model/config.txt",
            "data.train_files={folder}/model/config.txt: verl reads .parquet, .json, .jsonl by a file's name. Name parquet files.",
            ConfigError,
        ),
        (
            "data.train_files={folder}/model/broken.parquet",
            "{folder}/model/broken.parquet: cannot be read (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.). Name parquet files.",
            ConfigError,
        ),
        (
            "data.train_files={folder}/val.parquet",
            "data.train_files={folder}/val.parquet: no column demonstration. Add it.",
            ConfigError,
        ),
        (
            "data.prompt_key=question",
            "data.train_files={folder}/train.parquet: no column question. Add it.",
            ConfigError,
        ),
        (
            "data.train_files=[{folder}/train.parquet,{folder}/model/messages.parquet]",
            "hapo.demonstration_key=demonstration: text in {folder}/train.parquet, list in {folder}/model/messages.parquet, and verl reads all files as one table. Write the column in one type.",
            ConfigError,
        ),
        (
            "actor_rollout_ref.model.path={folder}/no",
            "actor_rollout_ref.model.path={folder}/no: no such folder on this machine. Name one, or a model of the Hugging Face hub as owner/name.",
            MissingFileError,
        ),
        (
            "actor_rollout_ref.model.path='~/models/mine'",
            "actor_rollout_ref.model.path=~/models/mine: no such folder on this machine (a leading ~ is not expanded). Name one, or a model of the Hugging Face hub as owner/name.",
            MissingFileError,
        ),
        (
            "actor_rollout_ref.model.path={folder}",
            "actor_rollout_ref.model.path={folder}: this folder has no config.json. Name a model's folder.",
            ConfigError,
        ),
        (
            "actor_rollout_ref.model.path={folder}/model/",
            "actor_rollout_ref.model.path={folder}/model/: verl refuses a path with a slash at its end. Leave it out.",
            ConfigError,
        ),
        (
            "reward.custom_reward_function.path={folder}/reward.py",
            "reward.custom_reward_function.path={folder}/reward.py: no such file on this machine. Name a Python file, or leave it null for verl's own.",
            MissingFileError,
        ),
    ],
)
def test_missing_files_and_columns_are_named_with_their_key(check, folder, override, message, kind):
    (folder / "model" / "config.txt").touch()
    (folder / "model" / "broken.parquet").write_text("no parquet")
    messages = [{"role": "assistant", "content": "1"}]
    write(folder / "model" / "messages.parquet", ROW | {"demonstration": messages})
    with pytest.raises(ConfigError) as error:
        check(override)
    assert str(error.value) == message.format(folder=folder)
    assert type(error.value) is kind


def test_files_without_any_demonstration_go_with_any_type(check, folder):
    write(folder / "none.parquet", ROW | {"demonstration": None})
    check("data.train_files=[{folder}/train.parquet,{folder}/none.parquet]")


def test_a_users_own_reward_manager_may_read_other_columns(check, folder):
    write(folder / "prompts.parquet", {"prompt": ROW["prompt"], "demonstration": "1"})
    own = ["data.train_files={folder}/prompts.parquet", "reward.reward_manager.source=importlib"]
    check(*own)
    with pytest.raises(ConfigError, match="no column data_source, reward_model"):
        check(own[0])
