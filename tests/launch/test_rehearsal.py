"""The doctor's checks of a launch, before anything is started: it describes a correct launch and names each error."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hapo_verl.config import ConfigError
from hapo_verl.data.parquet import write_parquet
from hapo_verl.launch import teachable
from hapo_verl.launch.rehearsal import GIB, Rehearsal
from hapo_verl.launch.teachable import Asked, does_not_fit, score
from tests.rollout.tool_chat import QWEN, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import digits
import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of 64 positions, 20 training rows (one overlong, one missing, one wrong), and validation data."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_model.write(folder / "model", alphabet="0123456789", hidden=64, layers=1, seed=0)
    rows = [digits.row(f"{number:03d}", number, "train") for number in range(20)]
    rows[0]["demonstration"], rows[1]["demonstration"], rows[2]["demonstration"] = "0" * 9, None, "7"
    write_parquet(rows, folder / "train.parquet")
    write_parquet([{key: value for key, value in rows[5].items() if key != "demonstration"}], folder / "val.parquet")
    return folder


def rehearsal(folder, *overrides):
    return Rehearsal(
        [
            "+hapo=paper",
            f"data.train_files={folder}/train.parquet",
            f"data.val_files={folder}/val.parquet",
            "data.train_batch_size=16",
            "data.max_prompt_length=24",
            "data.max_response_length=8",
            f"actor_rollout_ref.model.path={folder}/model",
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.rollout.max_model_len=32",
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
            "actor_rollout_ref.actor.use_dynamic_bsz=true",
            f"reward.custom_reward_function.path={digits.__file__}",
            *overrides,
        ]
    )


def test_a_correct_launch_is_described_with_counts(folder):
    positions = rehearsal(folder)._hf_config.max_position_embeddings
    found = {name: check() for name, check in rehearsal(folder).checks()}
    taught = found.pop("what the loss can teach")
    assert taught.startswith(
        "every token of 18 demonstrations; the loss teaches tokens down to a probability of 2.5e-04, the least likely "
    )
    assert found | {"memory of the head": ""} == {
        "launch": "gate paper with threshold 0.8, prior_success 1.0, prior_failure 1.0; replace",
        "sizes": "16 prompts x 8 rollouts = 128 rows a step, 1 update(s) of 16 rows on each of 8 rank(s)",
        "columns": "data_source, prompt, reward_model in 2 file(s), demonstration in those to train on",
        "weights": f"{folder}/model sends 1 MiB at every update; 2048 MiB at a time",
        "demonstrations": (
            "18 of 20 looked at can be injected, 5.0% do not fit data.max_response_length=8 (longest that fits: 4 "
            "tokens); 1 missing; 20 rows"
        ),
        "reward function": "9 of 10 demonstrations are successes",
        "model": f"qwen2 with {positions} positions, 32 asked for",
        "memory of the head": "",
    }
    assert found["memory of the head"].startswith("off is chosen; at 16384 tokens a rank, estimated: off 0.0")


@pytest.mark.parametrize(
    ("check", "overrides", "message"),
    [
        ("launch", ["critic.enable=true"], "critic.enable=True: HAPO's advantages are group-relative"),
        (
            "sizes",
            ["actor_rollout_ref.actor.ppo_mini_batch_size=5"],
            "actor_rollout_ref.actor.ppo_mini_batch_size=5: data.",
        ),
        (
            "columns",
            ["hapo.demonstration_key=target"],
            "data.train_files={folder}/train.parquet: no column target. Add it.",
        ),
        (
            "columns",
            ["data.val_files=[{folder}/val.parquet,{folder}/no.parquet]"],
            "data.val_files={folder}/no.parquet: no such file on this machine. Name local parquet files.",
        ),
        (
            "demonstrations",
            ["data.max_response_length=1"],
            "hapo.demonstration_key=demonstration: none of 20 demonstrations looked at can be injected (19 overlong, 1 missing).",
        ),
        (
            "reward function",
            ["hapo.success_threshold=2.0"],
            "reward.custom_reward_function.path="
            + digits.__file__
            + ": none of 10 demonstrations is a success, so none",
        ),
        (
            "reward function",
            ["reward.custom_reward_function.name=no_such"],
            "reward.custom_reward_function.path=" + digits.__file__ + ": cannot be loaded (",
        ),
        (
            "model",
            ["actor_rollout_ref.rollout.max_model_len=1000000"],
            "actor_rollout_ref.model.path={folder}/model: it has ",
        ),
    ],
)
def test_each_error_is_named(folder, check, overrides, message):
    checks = dict(rehearsal(folder, *(override.format(folder=folder) for override in overrides)).checks())
    with pytest.raises(ConfigError) as error:
        checks[check]()
    assert str(error.value).startswith(message.format(folder=folder))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A model with tools and 20 rows: calls as messages, one call as text, and one of an unknown tool."""
    folder = tmp_path_factory.mktemp("tools")
    make_tokenizer(QWEN).save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    # The reward checks the number of turns, as verl counts them, and the end of the text.
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    rounds = solution_str.count('<tool_response>')\n"
        "    return float(solution_str.endswith(ground_truth) and extra_info['num_turns'] == 2 + 2 * rounds)\n"
    )
    rows = [digits.row(f"{number:03d}", number, "train") for number in range(20)]
    for number, row in enumerate(rows):
        answer, digits_ = row["demonstration"], row["prompt"][0]["content"]
        name, arguments = "repeat" if number == 1 else "reverse", json.dumps({"digits": digits_})
        function = {"type": "function", "function": {"name": name, "arguments": arguments}}
        spelt = f'<tool_call>{{"name": "reverse", "arguments": {arguments}}}</tool_call>'
        row["demonstration"] = [
            {
                "role": "assistant",
                "content": spelt if number == 2 else "",
                "tool_calls": [] if number == 2 else [function],
            },
            {"role": "tool", "content": answer, "tool_calls": []},
            {"role": "assistant", "content": answer, "tool_calls": []},
        ]
    write_parquet(rows, folder / "train.parquet")
    write_parquet([{key: value for key, value in rows[5].items() if key != "demonstration"}], folder / "val.parquet")
    return folder


MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
REVERSE = Path(__file__).parents[1] / "e2e" / "reverse_tool.py"


def test_demonstrations_with_calls_are_counted_and_scored_as_the_run_would(tools):
    overrides = [
        "data.max_response_length=400",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        f"{MULTI_TURN}.function_tool_path={REVERSE}",
        f"reward.custom_reward_function.path={tools}/reward.py",
    ]
    found = dict(rehearsal(tools, *overrides).checks())
    assert found["demonstrations"]() == (
        "19 of 20 looked at can be injected, 0.0% do not fit data.max_response_length=400 (longest that fits: 126 "
        "tokens); 1 malformed; 20 rows"
    )
    assert found["reward function"]() == "10 of 10 demonstrations are successes"
    # The prompt contains the tools, as in the loop.
    launched = rehearsal(tools, *overrides)
    assert '"name": "reverse"' in launched.tokenizer.decode(launched._prompt(5))
    with pytest.raises(ConfigError, match=r"\(20 overlong\).* Those in which tools answer need actor_"):
        dict(rehearsal(tools, *overrides[1:]).checks())["demonstrations"]()
    with pytest.raises(ConfigError, match=r"\(20 overlong\)"):
        dict(rehearsal(tools, *overrides, f"{MULTI_TURN}.max_assistant_turns=1").checks())["demonstrations"]()
    with pytest.raises(ConfigError, match=r"\(20 malformed\)"):
        dict(rehearsal(tools, *overrides, f"{MULTI_TURN}.format=seed").checks())["demonstrations"]()


def test_a_head_that_does_not_fit_the_gpu_is_wrong(folder, monkeypatch):
    small = SimpleNamespace(total_memory=GIB // 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    huge = rehearsal(folder, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2000000000")
    with pytest.raises(
        ConfigError, match=r"^hapo\.kernels\.head=off: at 2000000000 tokens a rank off .* GPU has 0\.01 GiB"
    ):
        huge.memory()
    assert rehearsal(folder).memory().startswith("off is chosen")


@pytest.fixture(scope="module")
def biased(folder, tmp_path_factory):
    """A model whose head hardly ever writes the digit 7."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("biased") / "model"
    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    # The first unit of every hidden state is made large, and only the logit of 7 uses it, with the opposite sign.
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.encode("7")[0], 0] = -3.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_token_that_the_loss_cannot_teach_is_named_with_the_key_that_teaches_it(folder, biased):
    launched = [f"actor_rollout_ref.model.path={biased}"]
    paper = rehearsal(folder, *launched).teachable()
    # These are 007 and 017, which can be injected, and row 2, whose demonstration is 7.
    assert paper.startswith(
        "3 of 18 demonstrations (17%) have a token that the loss does not teach, and may never be written: "
        "hapo.loss.shape=power with exponent 1.0 and shaping 0.1 teaches tokens down to a probability of 2.5e-04, the "
        "least likely token of a demonstration (median: "
    )
    assert paper.endswith("Use hapo.loss.exponent=0.0 hapo.loss.shaping=1.0, which teaches every token.")
    chord = rehearsal(folder, *launched, "hapo.loss.shape=chord").teachable()
    assert "teaches tokens down to a probability of 2.5e-03, " in chord
    # Most demonstrations have no 7, and the 16 other tokens are equally likely: 4 q (1 - q) at q = 1/16.
    assert "has 6.2e-02 and 23% of the largest weight. Use" in chord
    assert chord.endswith(
        "Use hapo.loss.shape=power hapo.loss.exponent=0.0 hapo.loss.shaping=1.0, which teaches every token."
    )
    taught = rehearsal(folder, *launched, "hapo.loss.exponent=0.0").teachable()
    assert taught.startswith("every token of 18 demonstrations; the loss teaches tokens however improbable, the least")


def test_the_model_is_not_loaded_if_it_is_not_wanted_missing_or_too_large(folder, monkeypatch):
    names = [name for name, _ in Rehearsal(rehearsal(folder)._overrides, model=False).checks()]
    assert "what the loss can teach" not in names
    absent = rehearsal(folder, "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B").teachable()
    assert absent == ("not looked at: actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B is no folder on this machine")
    assert rehearsal(folder, "hapo.gate.name=never").teachable() == (
        "not looked at: hapo.gate.name=never trains on no demonstration"
    )
    assert not does_not_fit(folder / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, GIB))
    assert rehearsal(folder).teachable() == (
        f"not looked at: actor_rollout_ref.model.path={folder}/model has 0.0 GiB of weights, 0.0 GiB of GPU memory free"
    )


def test_a_demonstration_is_scored_as_the_model_predicts_it_token_by_token(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    asked = Asked(prompt=[1, 5, 2, 9], response=[3, 4, 8], mask=[1, 0, 1])
    how = {"temperature": 0.7, "trust_remote_code": False}
    monkeypatch.setattr(teachable, "ROWS", 2)
    scored, _ = score(folder / "model", [asked, asked], seconds=60.0, **how)
    # Even without any time, one demonstration is scored.
    assert len(score(folder / "model", [asked] * 3, seconds=0.0, **how)) == 1
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = []
    for place, token in enumerate(asked.response):
        logits = model(torch.tensor([asked.prompt + asked.response[:place]])).logits[0, -1] / 0.7
        expected.append(logits.log_softmax(-1)[token].item())
    assert scored.tokens.tolist() == [3, 8]
    assert scored.logp.tolist() == pytest.approx([expected[0], expected[2]], abs=1e-5)
