"""The policy's own successes in the trainer: which rows are kept, what a prompt gets, what a checkpoint contains."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue as tq

from hapo_verl.algo.demonstration import Response
from hapo_verl.algo.own_successes import unpacked
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper
from hapo_verl.driver.own_past import OWN_PAST_FILE, shortest_successes
from hapo_verl.driver.trainer import HapoTrainerSync
from hapo_verl.protocol.rows import OWN_SUCCESS
from tests.driver.step_process import Queue
from tests.driver.test_gatekeeper import ROWS, submit


def a_keeper(source="own", *, gate="paper", rows=ROWS, **keys):
    hapo = HapoConfig.parse({"gate": {"name": gate}, "demonstrations": {"source": source, **keys}})
    keeper = Gatekeeper(hapo, total_steps=100)
    keeper.know(rows, prompt_column="prompt")
    return keeper


def of(*tokens):
    return Response(list(tokens), [1] * len(tokens), 1, 0)


def recalled(keeper, step):
    """For each prompt the tokens and the step of the attached success, or None."""
    successes = [unpacked(situation["own"]) if situation["own"] else None for situation in submit(keeper, step=step)]
    return [success and (success.response.tokens, success.step) for success in successes]


def keys(keeper):
    return [situation["key"] for situation in submit(keeper)]


def test_a_prompt_is_given_only_its_own_success():
    keeper = a_keeper()
    assert recalled(keeper, 1) == [None] * 8
    keeper.own_past.observe([(keys(keeper)[3], of(5, 6, 7)), (keys(keeper)[3], of(5, 7))], 1)
    assert recalled(keeper, 2) == [([5, 7], 1) if prompt == 3 else None for prompt in range(8)]


def test_with_only_a_column_nothing_is_attached_or_kept(tmp_path):
    keeper = a_keeper("column")
    assert keeper.own_past is None
    assert all(situation["key"] is None and "own" not in situation for situation in submit(keeper))
    keeper.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_success_that_is_too_old_is_not_given():
    keeper = a_keeper(own_max_age=2)
    keeper.own_past.observe([(keys(keeper)[0], of(5))], 1)
    assert [recalled(keeper, step)[0] for step in (2, 3, 4)] == [([5], 1), ([5], 1), None]


@pytest.mark.parametrize("gate", ["paper", "posterior"])
def test_a_resumed_run_gives_the_same_successes_and_keeps_the_gates_state(gate, tmp_path):
    keeper = a_keeper(gate=gate, own_max_age=5)
    for step, prompt in ((1, 0), (2, 1), (3, 0)):
        keeper.own_past.observe([(keys(keeper)[prompt], of(step, 7, 8))], step)
    keeper.save(tmp_path)
    resumed = a_keeper("column_or_own", gate=gate, rows=ROWS[::-1], own_max_age=5)
    resumed.load(tmp_path)
    assert resumed.own_past.metrics() == keeper.own_past.metrics()
    for step in (4, 7, 8, 9):
        assert submit(resumed, step=step) == submit(keeper, step=step)
        # The success of prompt 1 is from step 2.
        assert (recalled(keeper, step)[1] is None) == (step > 7)
        for each in (keeper, resumed):
            each.own_past.observe([(keys(each)[step % 4 + 4], of(9))], step)


def test_a_checkpoint_holds_only_arrays_of_numbers(tmp_path):
    keeper = a_keeper()
    keeper.own_past.observe([(keys(keeper)[0], of(5))], 1)
    keeper.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [OWN_PAST_FILE]
    with np.load(tmp_path / OWN_PAST_FILE, allow_pickle=False) as arrays:
        assert {arrays[name].dtype.kind for name in arrays} == {"u", "i"}


@pytest.mark.parametrize("content", [b"", b"PK but no archive", b"\x80\x04pickled", None, "objects"])
def test_a_file_without_successes_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / OWN_PAST_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        np.savez(path, keys=np.array([1], dtype=np.uint64))
    else:
        np.savez(path, keys=np.array([object()], dtype=object))
    with pytest.raises(ConfigError) as error:
        a_keeper().load(tmp_path)
    assert str(error.value).startswith(f"{path}: not the policy's successes (")
    assert str(error.value).endswith(
        "). Resume from another checkpoint with trainer.resume_from_path, or remove that file to start anew."
    )
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_without_the_file_starts_empty_and_is_reported(tmp_path, caplog):
    a_keeper().load(tmp_path)
    assert f"has no {OWN_PAST_FILE}; the policy's own past starts anew" in caplog.text


def test_prompts_that_share_an_index_are_reported(caplog):
    a_keeper(rows=[*ROWS, ROWS[0]])
    assert "1 of 9 rows share data_source and extra_info.index" in caplog.text


def a_tag(length, *, solved=True, padding=False):
    return {"response_len": length, "is_padding": padding} | ({OWN_SUCCESS: [1, 0]} if solved else {})


def test_only_the_shortest_complete_successes_of_each_group_are_fetched():
    rows = [
        ("a", a_tag(4), True),
        ("a", a_tag(3), True),
        ("a", a_tag(3), True),
        ("a", a_tag(2), False),
        ("a", a_tag(1, solved=False), True),
        ("b", a_tag(9), True),
        ("c", a_tag(1), True),
    ]
    uids, tags, whole = zip(*rows, strict=True)
    assert shortest_successes(tags, uids, whole, {"a": 1, "b": 2, "c": None}) == [1, 2, 5]


def remember(monkeypatch, rows, *, rejected=(), padding=()):
    """What the trainer keeps of a batch whose rows have uid, response, mask and tag."""
    queue = Queue()
    names = [f"{uid}_{number}_0" for number, (uid, *_) in enumerate(rows)]
    for name, (_, response, mask, _) in zip(names, rows, strict=True):
        queue.rows[name] = {"responses": torch.tensor(response), "response_mask": torch.tensor(mask)}
    monkeypatch.setattr(tq, "kv_batch_get", queue.get)
    trainer = object.__new__(HapoTrainerSync)
    trainer.gatekeeper, trainer.global_steps = a_keeper(), 4
    batch = SimpleNamespace(keys=names, tags=[tag for *_, tag in rows], partition_id="train")
    uids = [uid for uid, *_ in rows]
    whole_B = torch.tensor([i not in rejected and i not in padding for i in range(len(rows))])
    of_prompts = keys(trainer.gatekeeper)
    groups = {uid: {"key": of_prompts[number]} for number, uid in enumerate(dict.fromkeys(uids))}
    metrics = {}
    trainer._remember(batch, uids, whole_B, groups, metrics)
    found = [situation["own"] for situation in submit(trainer.gatekeeper, step=5)]
    return [unpacked(own) if own else None for own in found], metrics


def test_a_rows_exact_tokens_and_mask_are_kept(monkeypatch):
    rows = [
        ("a", [5, 6, 7, 8, 2], [1, 1, 0, 1, 1], {"response_len": 5, OWN_SUCCESS: [2, 1]}),
        ("a", [5, 6, 2], [1, 1, 1], {"response_len": 3}),
        ("b", [9, 2], [1, 1], {"response_len": 2}),
    ]
    found, metrics = remember(monkeypatch, rows)
    assert found[0] == (Response([5, 6, 7, 8, 2], [1, 1, 0, 1, 1], 2, 1), 4)
    assert found[1:] == [None] * 7
    assert metrics["hapo/own_past/prompts"] == 1
    assert 0 < metrics["hapo/own_past/mib"] < 0.01


def test_a_rejected_row_and_padding_are_not_kept(monkeypatch):
    rows = [(uid, [5, 2], [1, 1], a_tag(2)) for uid in "abc"]
    found, _ = remember(monkeypatch, rows, rejected=[0], padding=[1])
    assert [success is not None for success in found[:3]] == [False, False, True]


def test_a_step_without_a_success_fetches_nothing(monkeypatch):
    found, metrics = remember(monkeypatch, [("a", [5, 2], [1, 1], a_tag(2, solved=False))])
    assert found == [None] * 8
    assert metrics["hapo/own_past/prompts"] == 0
