"""HAPO's agent executor for OpenRLHF: which sample a demonstration replaces, what is scored, and what is refused."""

import random

import pytest
import torch
from transformers import GenerationConfig

from hapo_verl.config import ConfigError
from tests.openrlhf.conftest import PER_GROUP

END = "<|im_end|>"
FAILURES = (f"1{END}", f"12{END}", "123456", f"1234{END}")
ALWAYS = {"gate": {"name": "always"}}


def test_a_demonstration_takes_the_worst_samples_place(executor, generate, written):
    (rows,) = generate(executor(), *FAILURES)
    assert written(rows) == [f"1{END}", f"12{END}", f"210{END}", f"1234{END}"]
    assert [float(row["reward"]) for row in rows] == [0, 0, 1, 0]
    assert not any(row["truncated"] for row in rows)
    assert {row["extra_logs"]["hapo/injected/group_share"] for row in rows} == {1.0}
    assert {row["extra_logs"]["hapo/on_policy_reward"] for row in rows} == {0.0}


def test_a_demonstrations_row_is_written_like_a_samples(executor, generate):
    (rows,) = generate(executor(), *FAILURES)
    demonstration = rows[2]
    start, end = demonstration["action_ranges"][0]
    assert demonstration["observation_tokens"][:start] == rows[0]["observation_tokens"][:start]
    assert end == len(demonstration["observation_tokens"])
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert demonstration["extra_logs"]["length"] == 3
    # In OpenRLHF's batches all rows must have the same names.
    assert {tuple(row["extra_logs"]) for row in rows} == {tuple(rows[0]["extra_logs"])}


def test_a_group_that_succeeds_is_left_alone(executor, generate, written):
    texts = (f"210{END}", f"210{END}", f"210{END}", f"1{END}")
    (rows,) = generate(executor({"gate": {"threshold": 0.5}}), *texts)
    assert written(rows) == list(texts)
    assert rows[0]["extra_logs"]["hapo/on_policy_success"] == 0.75
    assert rows[0]["extra_logs"]["hapo/injected/group_share"] == 0


def test_concurrent_groups_are_judged_separately(executor, generate, written):
    first, second = generate(executor(), *FAILURES, questions=("012", "345"))
    assert [written(first)[2], written(second)[2]] == [f"210{END}", f"543{END}"]


@pytest.mark.parametrize(
    ("demonstration", "reason"),
    [(None, "missing"), ("999", "rejected"), ("0" * 9, "overlong"), ("<|im_start|>0", "malformed"), ("", "empty")],
)
def test_an_unusable_demonstration_is_counted_and_not_injected(executor, generate, written, demonstration, reason):
    (rows,) = generate(executor(), *FAILURES, demonstration=demonstration)
    assert written(rows) == list(FAILURES)
    assert rows[0]["extra_logs"][f"hapo/refused/{reason}"] == 1


@pytest.mark.parametrize(("more", "reason"), [(-1, "rejected"), (0, "overlong")])
def test_without_its_own_limit_a_demonstration_may_fill_the_room_after_the_prompt(
    executor, generate, tokenizer, prompted, more, reason
):
    room = 64 - len(tokenizer.encode(prompted("012"), add_special_tokens=False))
    (rows,) = generate(executor(), *FAILURES, max_tokens=None, demonstration="0" * (room + more))
    assert rows[0]["extra_logs"][f"hapo/refused/{reason}"] == 1


def test_the_demonstration_can_be_under_another_key_of_the_label(executor, generate, written):
    hapo = executor({"demonstration_key": "solution"})
    (rows,) = generate(hapo, *FAILURES, demonstration="999", solution="210")
    assert written(rows)[2] == f"210{END}"


def test_held_out_rows_are_only_sampled_and_scored(executor, generate, written):
    hapo = executor(ALWAYS | {"demonstration_key": "solution"})
    (rows,) = generate(hapo, *FAILURES, logprobs=1)
    assert written(rows) == list(FAILURES)
    assert [float(row["reward"]) for row in rows] == [0] * PER_GROUP
    assert rows[0]["extra_logs"]["hapo/gate/not_gated"] == 1
    (rows,) = generate(hapo, *FAILURES, size=1)
    assert written(rows) == [FAILURES[0]]


def test_a_group_with_a_sample_that_has_no_reward_is_not_judged(executor, generate, written):
    texts = (*FAILURES[:3], f"8{END}")
    (rows,) = generate(executor(ALWAYS), *texts)
    assert written(rows) == list(texts)
    assert rows[3]["reward"] is None


def test_an_engine_that_fails_fails_every_sample_of_the_group_and_no_other_group(executor, generate, written):
    hapo = executor()
    with pytest.raises(IndexError):
        generate(hapo, "")
    (rows,) = generate(hapo, *FAILURES)
    assert written(rows)[2] == f"210{END}"
    assert not hapo._groups


def test_a_chats_demonstration_ends_as_its_template_ends_a_turn(executor, generate, written, tokenizer, tmp_path):
    """The end of a text is a different token, as in base models; the model's folder names both."""
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", END])
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    tokenizer.name_or_path, tokenizer.eos_token = str(tmp_path), "<|endoftext|>"
    (rows,) = generate(executor(), *FAILURES)
    assert written(rows)[2] == f"210{END}"


def test_prompts_that_are_plain_text_get_plain_text_demonstrations(executor, generate, written, monkeypatch, tokenizer):
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda self, chat, **_: chat[0]["content"])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (rows,) = generate(executor(), *FAILURES)
    assert written(rows)[2] == f"210{END}"
    assert rows[2]["observation_tokens"] == tokenizer.encode(f"012210{END}", add_special_tokens=False)


def test_a_schedule_counts_the_groups_of_its_engine(executor, generate):
    gate = {"name": "annealed", "threshold": 0.8, "horizon": 4}
    hapo = executor({"gate": gate}, groups_per_engine=2)
    seen = [generate(hapo, *FAILURES)[0][0]["extra_logs"] for _ in range(10)]
    thresholds = [logs["hapo/gate/threshold"] for logs in seen]
    assert thresholds == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0, 0.0])
    # The posterior mean after 4 failures is 1/6.
    assert [logs["hapo/injected/group_share"] for logs in seen] == [1.0] * 8 + [0.0] * 2
    after_restart = executor({"gate": gate}, groups_per_engine=2, first_step=4)
    assert generate(after_restart, *FAILURES)[0][0]["extra_logs"]["hapo/gate/threshold"] == pytest.approx(0.2)


def test_held_out_rows_do_not_count_as_steps_of_a_schedule(executor, generate):
    gate = {"name": "annealed", "threshold": 0.8, "horizon": 4}
    hapo = executor({"gate": gate, "demonstration_key": "solution"}, groups_per_engine=1)
    generate(hapo, *FAILURES)
    assert generate(hapo, *FAILURES, solution="210")[0][0]["extra_logs"]["hapo/gate/threshold"] == 0.8


def test_a_budget_is_kept_in_each_step(executor, generate):
    hapo = executor(ALWAYS | {"budget": {"share": 0.5}}, groups_per_engine=4)
    logs = [generate(hapo, *FAILURES)[0][0]["extra_logs"] for _ in range(8)]
    injected = [entry["hapo/injected/group_share"] for entry in logs]
    assert [sum(injected[:4]), sum(injected[4:])] == [2, 2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"label": "210"},
            "--data.label_key: '210' is no JSON object with the key label. Write "
            '{"label": ..., "demonstration": ...} into that column, and no demonstration on held-out rows.',
        ),
        ({"label": '{"answer": "210"}'}, '--data.label_key: \'{"answer": "210"}\' is no JSON object with'),
        (
            {"size": 1},
            "--rollout.n_samples_per_prompt=1: a demonstration joins a group of samples. Use 8.",
        ),
        (
            {"logprobs": 1},
            "--algo.advantage.is_correction_enable: a demonstration was not sampled. Remove it.",
        ),
        (
            {"images": ["a.png"]},
            "--data.image_key: a demonstration is one turn of text. Use prompts without images.",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(executor, generate, given, said):
    with pytest.raises(ConfigError) as error:
        generate(executor(), *FAILURES, **given)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


WRITTEN = (
    *(f"000{END}", f"12{END}", "123456", f"1234{END}"),
    *(f"9{END}", f"12345{END}", "987654", f"123{END}"),
)


class Digits:
    """The tests' task with the plain loop's interface."""

    tokens = 6

    def is_right(self, problem, text):
        return text == problem.answer


def in_the_plain_loop(tokenizer):
    """Rows of the plain loop, and their advantages as in the paper."""
    import plain_loop
    import tiny_model
    from task import Problem

    policy = plain_loop.Policy(tiny_model.make_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, Digits())
    problems = [Problem(question, question[::-1], question[::-1]) for question in ("000", "001")]
    repeated = [problem for problem in problems for _ in range(PER_GROUP)]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in WRITTEN]
    response_BT = torch.tensor([row + [tokenizer.eos_token_id] * (6 - len(row)) for row in ids])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in ids])
    batch = plain_loop.Rows(
        *policy.encode([problem.question for problem in repeated]),
        response_BT,
        mask_BT,
        policy.scores(repeated, response_BT, mask_BT),
        torch.arange(2).repeat_interleave(PER_GROUP),
        torch.zeros(len(ids), dtype=torch.bool),
    )
    for number, problem in enumerate(problems):
        group = range(number * PER_GROUP, (number + 1) * PER_GROUP)
        batch = plain_loop.inject(batch, group, policy.demonstration(problem), "replace", random.Random(0))
    return batch, plain_loop.advantages(batch, "all", scale_by_std=True)


def test_rows_and_advantages_equal_those_of_the_plain_loop(executor, generate, tokenizer):
    hapo = executor()
    (first,) = generate(hapo, *WRITTEN[:PER_GROUP], questions=("000",))
    (second,) = generate(hapo, *WRITTEN[PER_GROUP:], questions=("001",))
    rows = [*first, *second]
    batch, advantage_B = in_the_plain_loop(tokenizer)
    assert [row["observation_tokens"][slice(*row["action_ranges"][0])] for row in rows] == [
        ids[mask.bool()].tolist() for ids, mask in zip(batch.response_BT, batch.mask_BT, strict=True)
    ]
    assert torch.equal(torch.tensor([float(row["reward"]) for row in rows]), batch.score_B)
    assert batch.demonstration_B.sum() == 2
    # This is OpenRLHF's group_norm.
    score_GN = batch.score_B.view(-1, PER_GROUP)
    group_norm = (score_GN - score_GN.mean(-1, keepdim=True)) / (score_GN.std(-1, keepdim=True) + 1e-9)
    torch.testing.assert_close(group_norm.flatten(), advantage_B, rtol=1e-5, atol=1e-6)
