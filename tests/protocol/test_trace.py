"""The trace samples the same prompts in every step, and its files stay small and keep their beginning and end."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.protocol.rows import DEMONSTRATION
from hapo_verl.protocol.trace import MIB, Trace, read_groups, read_lines

LAUNCH = OmegaConf.create(
    {
        "actor_rollout_ref": {"model": {"path": "m"}, "rollout": {"temperature": 0.5}},
        "trainer": {"logger": ["console"], "project_name": "p", "experiment_name": "e"},
    }
)


def groups(step, prompts):
    return {
        f"{step}/{index}": {"index": index, "data_source": "s", "successes": [False], "outcome": "not_fired"}
        for index in prompts
    }


def jagged(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_the_same_prompts_are_sampled_whenever_they_recur(tmp_path):
    trace = Trace(str(tmp_path), groups=3)

    def sampled(by, step):
        # verl gives a prompt a new uid each time.
        named = {f"{step * index * 7919 % 101:03}-{uid}": group for index, (uid, group) in enumerate(of(step).items())}
        return {named[uid]["index"] for uid in by.sample(named)}

    def of(step):
        return groups(step, range(40) if step % 2 else reversed(range(40)))

    first = sampled(trace, 1)
    assert sampled(trace, 2) == sampled(trace, 3) == first
    assert len(first) == len(trace.sampled) == 3
    # The same prompts are sampled among others too, because all traces use the same order of prompts.
    assert first <= sampled(Trace(str(tmp_path), groups=9), 4)
    whole = Trace(str(tmp_path))
    assert whole.sample(groups(1, range(4))) == {f"1/{index}" for index in range(4)}
    assert whole.sampled is None


def test_a_bounded_file_keeps_its_beginning_and_its_end_in_the_order_of_the_steps(tmp_path):
    trace, limit = Trace(str(tmp_path), mib=0.02), 0.02 * MIB
    for step in range(1, 1001):
        trace.groups(step, groups(step, [0]))
    steps = [group["step"] for group in read_groups(tmp_path)]
    files = sorted(tmp_path.glob("groups*.jsonl"))
    line = max(len(text) for file in files for text in file.read_text().splitlines())
    assert sum(file.stat().st_size for file in files) <= 0.75 * limit + 3 * line
    assert steps == sorted(set(steps))
    quarter = limit / 4 / line
    assert steps[: int(quarter)] == list(range(1, int(quarter) + 1))
    assert steps[-int(quarter) :] == list(range(1001 - int(quarter), 1001))
    # Without a limit everything is kept.
    whole = Trace(str(tmp_path / "whole"))
    for step in range(1, 101):
        whole.groups(step, groups(step, [0]))
    assert [group["step"] for group in read_groups(tmp_path / "whole")] == list(range(1, 101))


def test_rows_of_the_loss_have_the_log_probabilities_of_their_own_tokens(tmp_path):
    data = TensorDict({"responses": jagged([[1, 2, 3], [4], [5, 6]]), DEMONSTRATION: torch.tensor([0, 1, 0]).bool()}, 3)
    data["uid"] = ["a", "b", "c"]
    logp_BT = torch.tensor([[-1.0, -2.0, -3.00049], [-4.0, 0.0, 0.0], [-5.0, -6.0, 0.0]], requires_grad=True)
    Trace(str(tmp_path), groups=1).loss_rows(
        data, ["uid", "responses", DEMONSTRATION], logp_BT, sampled=["c", "a", "z"]
    )
    assert list(read_lines(tmp_path, "loss-*")) == [
        {"uid": "a", "responses": [1, 2, 3], DEMONSTRATION: False, "logp": [-1.0, -2.0, -3.0]},
        {"uid": "c", "responses": [5, 6], DEMONSTRATION: False, "logp": [-5.0, -6.0]},
    ]
    Trace(str(tmp_path / "all")).loss_rows(data, ["uid", "responses"], logp_BT)
    assert [row["uid"] for row in read_lines(tmp_path / "all", "loss-*")] == ["a", "b", "c"]
    Trace(None).loss_rows(data, ["uid"], logp_BT)


def test_an_incomplete_line_is_left_out_and_the_trace_is_found_in_its_run(tmp_path):
    folder = tmp_path / "trace"
    Trace(str(folder)).groups(1, groups(1, [0, 1]))
    with (folder / "groups.jsonl").open("a") as file:
        file.write('{"step": 2, "ui')
    assert [group["index"] for group in read_groups(tmp_path)] == [0, 1]
    assert [group["index"] for group in read_groups(folder)] == [0, 1]


def test_what_a_reader_needs_to_know_about_the_launch_is_written_once(tmp_path):
    hapo = HapoConfig.parse({"trace_dir": str(tmp_path), "loss": {"shaping": "inf", "exponent": 0.0}})
    trace = Trace.of(hapo)
    trace.launch(LAUNCH, hapo, 1)
    trace.launch(OmegaConf.create({}), hapo, 2)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["loss"] == {"shape": "power", "shaping": "inf", "exponent": 0.0}
    assert (found["model"], found["temperature"], found["gate"], found["mode"]) == ("m", 0.5, "paper", "replace")


def test_the_file_of_verls_metrics_is_named_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = []
    for number, (logger, variables) in enumerate(
        [
            (["console"], {}),
            (["console", "file"], {}),
            (["file"], {"VERL_FILE_LOGGER_ROOT": "logs"}),
            (["file"], {"VERL_FILE_LOGGER_PATH": "m.jsonl"}),
        ]
    ):
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            folder = tmp_path / str(number)
            launch = OmegaConf.merge(LAUNCH, {"trainer": {"logger": logger}})
            Trace(str(folder)).launch(launch, HapoConfig.parse({}), 1)
        named.append(json.loads((folder / "run.json").read_text())["metrics"])
    files = (tmp_path / "p" / "e.jsonl", tmp_path / "logs" / "p" / "e.jsonl", tmp_path / "m.jsonl")
    assert named == [None, *map(str, files)]


def test_a_new_run_moves_the_earlier_trace_and_a_resumed_run_appends_to_it(tmp_path):
    folder = tmp_path / "trace"
    for first_step in (1, 1, 3, 1):
        trace = Trace(str(folder))
        trace.launch(LAUNCH, HapoConfig.parse({}), first_step)
        for step in range(first_step, first_step + 2):
            trace.groups(step, groups(step, [0]))
    kept = {path.name: [group["step"] for group in read_lines(path, "groups")] for path in tmp_path.iterdir()}
    assert kept == {"trace.1": [1, 2], "trace.2": [1, 2, 3, 4], "trace": [1, 2]}


def test_a_run_continues_without_a_trace_if_none_can_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "trace", tmp_path / "file" / "other"):
        # The actors create a trace for each micro-batch.
        for _ in range(3):
            trace = Trace(str(folder))
            trace.launch(LAUNCH, HapoConfig.parse({}), 1)
            trace.groups(1, groups(1, [0]))
            assert not trace.is_on
    assert len(caplog.records) == 2
    assert caplog.messages[0].startswith(f"hapo: hapo.trace_dir={tmp_path}/file/trace: ")
    assert caplog.messages[0].endswith("name a folder that every node can write, or null.")


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"trace_groups": 0}, "hapo.trace_groups=0: a number of groups is a positive integer. Use null for all."),
        ({"trace_groups": True}, "hapo.trace_groups=True: a number of groups is a positive integer. Use null for all."),
        ({"trace_limit": -1}, "hapo.trace_limit=-1: a size in MiB is positive. Use null for no limit."),
    ],
)
def test_a_bound_is_a_positive_number(block, text):
    with pytest.raises(ConfigError) as error:
        HapoConfig.parse(block)
    assert str(error.value) == text
