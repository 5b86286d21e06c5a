"""HAPO in TRL's trainer: which completion is replaced, what is scored, what is learned, and with which settings."""

import math

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
import torch

from hapo_verl.trl.trainer import DEMONSTRATION
from tests.trl.conftest import PER_GROUP, reward, rows

ALWAYS = {"gate": {"name": "always"}}


def batch(trainer, prompts=2):
    """A generation batch of the first prompts."""
    return [row for row in rows(prompts) for _ in range(PER_GROUP)]


def generated(trainer, **more):
    trainer.model.train()
    return trainer._generate_and_score_completions(batch(trainer, **more))


def metrics(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def writes(trainer, monkeypatch, *texts):
    """Let the policy write these texts instead of sampling, starting again from the first when they run out."""

    def generate(prompt_ids, *args, **kwargs):
        chosen = [texts[i % len(texts)] for i in range(len(prompt_ids))]
        return [trainer._tokenizer.encode(text, add_special_tokens=False) for text in chosen], None

    monkeypatch.setattr(trainer, "_generate_single_turn", generate)


def test_a_demonstration_takes_the_worst_completions_place(trainer, monkeypatch):
    hapo = trainer()
    writes(hapo, monkeypatch, "1<|im_end|>", "12<|im_end|>", "123456", "1234<|im_end|>")
    output = generated(hapo)
    assert output[DEMONSTRATION].tolist() == [False, False, True, False] * 2
    end = hapo._tokenizer.eos_token
    texts = hapo._tokenizer.batch_decode(output["completion_ids"])
    assert [text.replace("<|endoftext|>", "") for text in texts[2::PER_GROUP]] == [f"000{end}", f"100{end}"]
    assert output["completion_mask"].sum(1).tolist() == [2, 3, 4, 5] * 2
    # Equal failures have no advantage. The demonstration has 1 - 0, divided by the deviation of (0, 0, 0, 1).
    expected = torch.tensor([0.0, 0.0, 1 / (0.5 + 1e-6), 0.0] * 2)
    torch.testing.assert_close(output["advantages"], expected)


def test_a_group_that_succeeds_is_left_alone(trainer, monkeypatch):
    hapo = trainer({"gate": {"threshold": 0.5}})
    writes(hapo, monkeypatch, *["000<|im_end|>"] * 3, "1<|im_end|>", *["1<|im_end|>"] * 4)
    output = generated(hapo)
    assert output[DEMONSTRATION].view(2, -1).any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("demonstration", "reason"),
    [(None, "missing"), ("999", "rejected"), ("0" * 9, "overlong"), ("<|im_start|>0", "malformed"), ("", "empty")],
)
def test_an_unusable_demonstration_is_counted_and_not_injected(trainer, demonstration, reason):
    data = [row | {"demonstration": demonstration} for row in rows(4)]
    hapo = trainer(data=[*data, *rows()[4:]])
    hapo.model.train()
    output = hapo._generate_and_score_completions([row for row in data[1:3] for _ in range(PER_GROUP)])
    assert not output[DEMONSTRATION].any()
    assert hapo._metrics["train"][f"hapo/refused/{reason}"] == [1.0]


def test_each_completion_is_scored_once(trainer):
    calls = []

    def counting(completions, **kwargs):
        calls.append(len(completions))
        return reward(completions, **kwargs)

    hapo = trainer(reward_funcs=counting)
    generated(hapo)
    assert calls == [2 * PER_GROUP, 2]


def test_values_that_a_reward_function_logs_stay_one_per_row(trainer):
    def logging(completions, answer, log_extra, log_metric, **kwargs):
        log_extra("text", [completion[0]["content"] for completion in completions])
        log_metric("scored", len(completions))
        return reward(completions, answer)

    hapo = trainer(reward_funcs=logging)
    output = generated(hapo)
    texts = list(hapo._logs["extra"]["text"])
    assert len(texts) == 2 * PER_GROUP
    assert [text for text, yes in zip(texts, output[DEMONSTRATION], strict=True) if yes] == ["000", "100"]
    assert hapo._metrics["train"]["scored"] == [2 * PER_GROUP]
    assert list(hapo._logs["advantages"]) == output["advantages"].tolist()


def test_a_completion_without_a_reward_gets_no_advantage(trainer):
    def silent(completions, answer, **_):
        return [None if i == 1 else value for i, value in enumerate(reward(completions, answer))]

    hapo = trainer(reward_funcs=silent)
    output = generated(hapo)
    assert output[DEMONSTRATION].view(2, -1).any(1).tolist() == [False, True]
    assert output["advantages"][1] == 0
    assert hapo._metrics["train"]["hapo/gate/not_gated"] == [0.5]


def test_evaluation_injects_nothing(trainer):
    hapo = trainer(ALWAYS)
    hapo.model.eval()
    assert DEMONSTRATION not in hapo._generate_and_score_completions(batch(hapo))


def test_a_gate_that_never_fires_is_grpo(trainer, settings, tiny):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    # A reward that differs within a group, so that there is something to learn.
    def length(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    model, tokenizer = tiny()
    grpo = GRPOTrainer(
        model=model,
        reward_funcs=length,
        args=GRPOConfig(**settings()),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
    )
    grpo.train()
    hapo = trainer({"gate": {"name": "never"}}, reward_funcs=length)
    hapo.train()
    assert metrics(grpo, "reward") == metrics(hapo, "reward")
    for ours, theirs in zip(hapo.model.parameters(), grpo.model.parameters(), strict=True):
        # TRL adds 1e-4 to the deviation, verl and we 1e-6. A step of Adam is 1e-3 even where the gradient is next to 0,
        # and such an entry carries the difference: 1.7e-5 was seen on a CPU without AVX-512.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": PER_GROUP},
        {"num_iterations": 2, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, "per_device_train_batch_size": PER_GROUP},
        {"beta": 0.1},
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
        {"mask_truncated_completions": True},
        {"off_policy_mask_threshold": 0.5},
        {"log_completions": True},
        {"use_liger_kernel": False, "gradient_checkpointing": False, "pad_to_multiple_of": 4},
    ],
    ids=str,
)
def test_demonstrations_are_learned_in_every_setting(trainer, tiny, more, monkeypatch, tmp_path):
    if "beta" in more:
        # TRL loads the reference model by its name.
        tiny()[0].save_pretrained(tmp_path / "model")
        monkeypatch.setattr("trl.trainer.grpo_trainer.get_config_model_id", lambda config: str(tmp_path / "model"))
    hapo = trainer({"loss": {"exponent": 0.0}}, max_steps=6, **more)
    hapo.train()
    probabilities = metrics(hapo, "hapo/demonstration/probability")
    assert probabilities[-1] > 1.5 * probabilities[0]
    assert all(map(math.isfinite, metrics(hapo, "grad_norm")))
    assert set(metrics(hapo, "hapo/injected/group_share")) == {1.0}


def test_with_peft_only_the_adapter_is_trained(trainer):
    from peft import LoraConfig

    hapo = trainer(max_steps=1, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: value.detach().clone() for name, value in hapo.model.named_parameters()}
    hapo.train()
    changed = {name for name, value in hapo.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_prompts_that_are_plain_text_get_demonstrations_too(trainer, monkeypatch):
    data = [
        {"prompt": row["prompt"][0]["content"], "answer": row["answer"], "solution": row["answer"]} for row in rows()
    ]

    def exact(completions, answer, **_):
        return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]

    hapo = trainer({"demonstration_key": "solution"}, data=data, reward_funcs=exact)
    hapo.model.train()
    output = hapo._generate_and_score_completions([row for row in data[1:3] for _ in range(PER_GROUP)])
    ids = output["completion_ids"][output[DEMONSTRATION]]
    assert hapo._tokenizer.batch_decode(ids, skip_special_tokens=True) == ["100", "200"]


@pytest.mark.parametrize("name", ["adaptive", "posterior"])
def test_a_resumed_gate_continues_like_one_that_never_stopped(trainer, name, tmp_path):
    gate = {"gate": {"name": name}}
    whole = trainer(gate, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(gate, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, value in whole._gate_state.posterior.arrays().items() if name == "posterior" else []:
        assert (resumed._gate_state.posterior.arrays()[key] == value).all()
    assert metrics(resumed, "hapo/gate/threshold")[-1] == metrics(whole, "hapo/gate/threshold")[-1]
    assert (tmp_path / "run" / "checkpoint-2" / "hapo_gate.npz").exists()


def test_an_annealed_gate_ends_with_the_run(trainer):
    # One epoch has eight prompts, with two per step. The number of steps is not known before training begins.
    hapo = trainer({"gate": {"name": "annealed"}}, max_steps=-1, num_train_epochs=1)
    hapo.train()
    assert metrics(hapo, "hapo/gate/threshold") == pytest.approx([0.8, 0.6, 0.4, 0.2])
