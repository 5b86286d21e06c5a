"""Which models can get one of our heads, and what the head does with and without tokens to score."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hapo_verl.actor.head import Scores, install, logprob_score
from hapo_verl.config import ConfigError


class Model(nn.Module):
    """The parts of a Hugging Face causal language model that our head uses."""

    def __init__(self, lm_head, **settings):
        super().__init__()
        self.config = SimpleNamespace(**settings)
        self.lm_head = lm_head

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, hidden):
        return self.lm_head(hidden)


def linear(bias=False):
    torch.manual_seed(0)
    return nn.Linear(8, 11, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_score_it_equals_the_linear_layer_bit_for_bit(bias):
    model, hidden = Model(linear(bias)), torch.randn(2, 3, 8)
    expected = model(hidden)
    install(model)
    assert torch.equal(model(hidden), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_with_a_score_it_returns_log_probabilities_of_the_same_logits(bias):
    model, hidden = Model(linear(bias)), torch.randn(2, 3, 8)
    label_N, temperature_N = torch.tensor([0, 4, -100, 10, 2, 7]), torch.linspace(0.5, 2.0, 6)
    log_softmax_NV = torch.log_softmax(model(hidden).flatten(0, 1) / temperature_N[:, None], -1)
    install(model).score = logprob_score(label_N, temperature_N, with_entropy=True)
    scores = model(hidden)
    assert isinstance(scores, Scores)
    kept_N = label_N != -100
    expected_N = log_softmax_NV.gather(1, label_N.clamp(min=0)[:, None])[:, 0] * kept_N
    torch.testing.assert_close(scores.logp, expected_N)
    torch.testing.assert_close(scores.entropy, -(log_softmax_NV.exp() * log_softmax_NV).sum(1) * kept_N)


def test_under_autocast_it_multiplies_like_a_linear_layer_and_is_exact_afterwards():
    model, hidden = Model(linear()), torch.randn(1, 6, 8)
    label_N = torch.arange(6)
    rounded = hidden[0].bfloat16().float() @ model.lm_head.weight.bfloat16().float().T
    install(model).score = logprob_score(label_N, torch.ones(6), with_entropy=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(hidden)
    torch.testing.assert_close(scores.logp, torch.log_softmax(rounded, -1).diagonal())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Model(linear(), final_logit_softcapping=30.0),
            "hapo.kernels.head: Model with final_logit_softcapping=30.0 changes its logits after the head, or "
            "takes images. Use hapo.kernels.head=off.",
        ),
        (
            Model(nn.Sequential(linear())),
            "hapo.kernels.head: lm_head is a torch.nn.modules.container.Sequential; a plain Linear is needed. "
            "Leave lm_head out of actor_rollout_ref.model.target_modules, or use hapo.kernels.head=off.",
        ),
    ],
)
def test_a_model_that_does_not_train_on_plain_logits_is_refused(model, message):
    with pytest.raises(ConfigError) as error:
        install(model)
    assert str(error.value) == message


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), Model(linear()))
    with pytest.raises(ConfigError, match=r"lm_head is a peft\.tuners\.lora\.layer\.Linear; a plain Linear"):
        install(wrapped)


def test_settings_that_change_nothing_are_not_refused():
    install(Model(linear(), final_logit_softcapping=None, logit_scale=1.0))
