"""The trainer's part of the gates: what it attaches to prompts, remembers, saves and refuses."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.driver.gatekeeper import STATE_FILE, Gatekeeper, row_name
from hapo_verl.driver.mini_batches import grown_mini_batch

ROWS = [
    {"data_source": "math", "extra_info": {"index": index}, "prompt": [{"role": "user", "content": str(index)}]}
    for index in range(8)
]


def a_gatekeeper(name="paper", *, rows=ROWS, total_steps=100, **block):
    gate = {"name": name, **block.pop("gate", {})}
    keeper = Gatekeeper(HapoConfig.parse({"gate": gate, **block}), total_steps=total_steps)
    keeper.know(rows, prompt_column="prompt")
    return keeper


def submit(keeper, rows=ROWS, step=1):
    batch = {name: [row.get(name) for row in rows] for name in ("data_source", "extra_info", "prompt")}
    batch["raw_prompt"] = batch["prompt"]
    return keeper.situations(batch, step, prompt_column="prompt")


def groups(situations, successes):
    return [
        {"key": situation["key"], "successes": [i < s for i in range(8)], "firing": [1.0] * 9}
        for situation, s in zip(situations, successes, strict=True)
    ]


def test_the_papers_gate_attaches_the_same_values_in_every_step():
    keeper = a_gatekeeper(gate={"threshold": 0.7})
    expected = {"threshold": 0.7, "prior_success": 1.0, "prior_failure": 1.0, "admitted": True, "key": None}
    assert submit(keeper, step=1) == submit(keeper, step=50) == [expected] * 8


@pytest.mark.parametrize(
    ("horizon", "step", "threshold"), [(None, 1, 0.8), (None, 51, 0.4), (20, 11, 0.4), (20, 21, 0)]
)
def test_the_annealed_threshold_falls_with_the_number_of_updates(horizon, step, threshold):
    keeper = a_gatekeeper("annealed", gate={"horizon": horizon})
    assert submit(keeper, step=step)[0]["threshold"] == pytest.approx(threshold)


def test_the_adaptive_threshold_falls_with_observed_success():
    keeper = a_gatekeeper("adaptive", gate={"memory": 0.5})
    keeper.observe(groups(submit(keeper), [0] * 8))
    assert submit(keeper)[0]["threshold"] == 0.8
    keeper.observe(groups(submit(keeper), [8] * 8))
    assert submit(keeper)[0]["threshold"] == pytest.approx(0.4)


def test_groups_that_were_not_gated_do_not_change_the_threshold():
    keeper = a_gatekeeper("adaptive")
    keeper.observe([{"key": None, "successes": [], "firing": None}])
    assert submit(keeper)[0]["threshold"] == 0.8


def test_a_prompts_prior_reflects_its_earlier_successes():
    keeper = a_gatekeeper("posterior", gate={"strength": 2.0, "discount": 0.5})
    first = submit(keeper)
    assert {(s["prior_success"], s["prior_failure"]) for s in first} == {(1.0, 1.0)}
    keeper.observe(groups(first, [8] + [0] * 7))
    second = submit(keeper)
    assert second[0]["prior_success"] - second[1]["prior_success"] == pytest.approx(0.5 * 8)
    assert second[1]["prior_failure"] - second[0]["prior_failure"] == pytest.approx(0.5 * 8)


@pytest.mark.parametrize("name", ["adaptive", "posterior", "thompson"])
def test_a_resumed_gate_continues_like_one_that_never_stopped(name, tmp_path):
    keeper = a_gatekeeper(name)
    for successes in ([0, 1, 2, 3, 4, 5, 6, 7], [8, 8, 1, 0, 3, 3, 3, 3]):
        keeper.observe(groups(submit(keeper), successes))
    keeper.save(tmp_path)
    resumed = a_gatekeeper(name, rows=ROWS[::-1])
    resumed.load(tmp_path)
    for step in (3, 4):
        assert submit(resumed, step=step) == submit(keeper, step=step)
        for each in (keeper, resumed):
            each.observe(groups(submit(each, step=step), [1, 0, 1, 0, 8, 8, 8, 8]))
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize("name", ["paper", "annealed", "zero", "never", "always"])
def test_a_gate_without_memory_writes_nothing_and_needs_nothing(name, tmp_path):
    a_gatekeeper(name).save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    a_gatekeeper(name).load(tmp_path)


def test_the_state_of_another_data_set_is_refused(tmp_path):
    a_gatekeeper("posterior").save(tmp_path)
    with pytest.raises(ConfigError) as error:
        a_gatekeeper("posterior", rows=ROWS[:-1]).load(tmp_path)
    assert str(error.value) == (
        f"data.train_files: {tmp_path / STATE_FILE} belongs to another data set (its prompts have other ids). "
        "Use the data of that run, or remove that file to start anew."
    )


def test_the_state_of_another_gate_is_refused(tmp_path):
    a_gatekeeper("adaptive").save(tmp_path)
    with pytest.raises(ConfigError) as error:
        a_gatekeeper("posterior").load(tmp_path)
    assert str(error.value) == (
        f"hapo.gate.name=posterior: {tmp_path / STATE_FILE} was written by the gate adaptive. "
        "Use hapo.gate.name=adaptive, or remove that file to start anew."
    )


@pytest.mark.parametrize("content", [b"", b"PK but no archive", b"\x80\x04pickled"])
def test_a_file_that_is_not_a_state_is_refused_in_one_line(content, tmp_path):
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="not a gate's state"):
        a_gatekeeper("posterior").load(tmp_path)


def test_objects_in_the_file_are_never_unpickled(tmp_path):
    np.savez(tmp_path / STATE_FILE, gate=np.array([object()], dtype=object))
    with pytest.raises(ConfigError, match="not a gate's state"):
        a_gatekeeper("posterior").load(tmp_path)


def test_a_missing_state_is_reported(tmp_path, caplog):
    a_gatekeeper("posterior").load(tmp_path)
    assert "the gate posterior starts anew" in caplog.text


def test_rows_that_share_an_id_and_rows_without_one_are_reported(caplog):
    a_gatekeeper("posterior", rows=[*ROWS, ROWS[0]])
    assert "1 of 9 rows share data_source and extra_info.index" in caplog.text
    a_gatekeeper("posterior", rows=[{"data_source": "math", "extra_info": None, "prompt": ROWS[0]["prompt"]}, *ROWS])
    assert "1 of 9 prompts have no extra_info.index" in caplog.text


def test_a_prompt_without_an_index_is_identified_by_its_text():
    bare = [{"data_source": "math", "prompt": row["prompt"]} for row in ROWS]
    keys = [row_name(row, "prompt")[0] for row in bare]
    assert len(set(keys)) == 8
    keeper = a_gatekeeper("posterior", rows=bare)
    assert [situation["key"] for situation in submit(keeper, rows=bare)] == keys


@pytest.mark.parametrize(("step", "admitted"), [(1, 4), (6, 2), (11, 0)])
def test_a_budget_falls_to_zero_and_holds_for_any_split_of_a_step(step, admitted):
    budget = {"share": 0.5, "horizon": 10}
    assert sum(s["admitted"] for s in submit(a_gatekeeper(budget=budget), step=step)) == admitted
    keeper = a_gatekeeper(budget=budget)
    parts = [submit(keeper, rows=ROWS[start : start + 2], step=step) for start in range(0, 8, 2)]
    assert sum(s["admitted"] for part in parts for s in part) == admitted


def a_block(*, dynamic=True, micro=8, prompts=16):
    micro_batches = {"log_prob_use_dynamic_bsz": dynamic, "log_prob_micro_batch_size_per_gpu": micro, "n": 8}
    actor = {"ppo_mini_batch_size": prompts, "use_dynamic_bsz": dynamic, "ppo_micro_batch_size_per_gpu": micro}
    return OmegaConf.create({"actor": actor, "rollout": micro_batches, "ref": micro_batches})


@pytest.mark.parametrize(
    ("rows", "appended", "dp_size", "block", "expected"),
    [
        (144, 16, 1, a_block(), (1, 18)),  # Every group of the mini-batch is injected, so there is no padding.
        (129, 1, 1, a_block(), (1, 17)),
        (136, 8, 1, a_block(prompts=4), (4, 5)),  # Four mini-batches stay four.
        (144, 16, 16, a_block(), (1, 18)),
        (136, 8, 16, a_block(), (1, 18)),  # 17 * 8 rows cannot be divided by 16 ranks.
        (136, 8, 1, a_block(dynamic=False, micro=16), (1, 18)),
        (125, 5, 1, a_block(), (1, 16)),  # Failed sessions have left room for the demonstrations.
    ],
)
def test_appended_rows_make_mini_batches_larger_without_adding_any(rows, appended, dp_size, block, expected):
    assert grown_mini_batch(block, rows, appended, dp_size) == expected
    updates, prompts = expected
    assert rows <= updates * prompts * 8
