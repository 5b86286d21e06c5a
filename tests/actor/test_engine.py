"""Our heads compared with verl's in verl's own FSDP2 engine: log-probabilities, entropy, loss, every gradient."""

from itertools import product

import pytest
import torch

from tests.actor.engine_process import PROMPTS, RESPONSES, Case, run, steps_around_silence

ALONE = [
    *(Case(packed, tied, lora) for packed, tied, lora in product((True, False), repeat=3)),
    Case(temperature=1.0),
    Case(pad_to_length=True),
]
IN_HEAD = [
    Case(head="policy_head"),
    Case(head="policy_head", packed=False, tied=True, entropy_coefficient=0.3),
    Case(head="policy_head", lora=True),
    Case(head="policy_head", pad_to_length=True, entropy_coefficient=0.3),
]
PAIRED = [
    Case(),
    Case(packed=False, tied=True),
    Case(lora=True),
    Case(sequence_parallel=2),
    Case(sequence_parallel=2, pad_to_length=True),
    Case(silent_rank=1),
    Case(head="policy_head"),
    Case(head="policy_head", silent_rank=1),
]
INTERPRETED = [
    Case(triton=True),
    Case(triton=True, tied=True),
    Case(triton=True, lora=True),
    Case(triton=True, head="policy_head", entropy_coefficient=0.3),
    Case(triton=True, head="policy_head", lora=True),
    Case(triton=True, silent_rank=1),
    Case(triton=True, head="policy_head", silent_rank=1),
]
BFLOAT16 = Case(precision="bf16")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run([*ALONE, *IN_HEAD, BFLOAT16], 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return run(PAIRED, 2, tmp_path_factory.mktemp("paired"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run(INTERPRETED, 2, tmp_path_factory.mktemp("interpreted"))


def trained_positions():
    """Positions of the packed batch that predict a trained token; token 4 of response 3 is a tool token."""
    positions, start = [], 0
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        first = start + prompt - 1
        positions += [first + i for i in range(response) if (row, i) != (2, 3)]
        start += prompt + response
    return positions


def assert_same_training(verls, ours, positions):
    assert ours["engine"] == "HapoFSDPEngine"
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(ours[name][positions], verls[name][positions], rtol=1e-5, atol=1e-5)
        others = torch.ones(sum(PROMPTS + RESPONSES), dtype=torch.bool)
        others[positions] = False
        assert torch.equal(ours[name][others], torch.zeros(int(others.sum())))
    torch.testing.assert_close(ours["loss"], verls["loss"], rtol=1e-5, atol=1e-5)
    assert set(ours["metrics"]) == set(verls["metrics"])
    for name, metric in verls["metrics"].items():
        torch.testing.assert_close(ours["metrics"][name], metric, rtol=1e-5, atol=1e-5, msg=name)
    assert set(ours["gradients"]) == set(verls["gradients"]) == set(ours["parameters"])
    for name, gradient in verls["gradients"].items():
        bound = 1e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(ours["gradients"][name], gradient, rtol=1e-4, atol=bound, msg=name)


@pytest.mark.parametrize("case", [*ALONE, *IN_HEAD], ids=str)
def test_it_trains_as_verls_head_does(alone, case):
    heads = alone[case]
    assert_same_training(heads["off"][0], heads[case.head][0], trained_positions())


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_on_two_ranks_it_trains_as_verls_head_does(paired, case):
    heads = paired[case]
    for rank in range(2):
        positions = [] if rank == case.silent_rank else trained_positions()
        assert_same_training(heads["off"][rank], heads[case.head][rank], positions)


@pytest.mark.long
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_with_the_triton_kernels_it_trains_as_verls_head_does_on_two_ranks(interpreted, case):
    heads = interpreted[case]
    for rank in range(2):
        positions = [] if rank == case.silent_rank else trained_positions()
        assert_same_training(heads["off"][rank], heads[case.head][rank], positions)


def test_in_bf16_it_equals_verls_head_to_bf16_precision(alone):
    heads, positions = alone[BFLOAT16], trained_positions()
    verls, ours = heads["off"][0], heads["linear_logprob"][0]
    assert ours["log_probs"].dtype == torch.float32
    torch.testing.assert_close(ours["log_probs"][positions], verls["log_probs"][positions].float(), rtol=0, atol=0.2)
    exact = alone[Case()]["off"][0]["log_probs"][positions]
    assert (ours["log_probs"][positions] - exact).abs().mean() < (verls["log_probs"][positions] - exact).abs().mean()


def test_with_lora_only_adapters_train_and_the_frozen_head_gets_no_gradient(alone):
    gradients = alone[Case(lora=True)]["linear_logprob"][0]["gradients"]
    assert gradients
    assert all("lora_" in name and bool(gradient.any()) for name, gradient in gradients.items())


SILENT = [Case(head=head, entropy_coefficient=0.3) for head in ("off", "linear_logprob", "policy_head")]


@pytest.fixture(scope="module")
def around_silence(tmp_path_factory):
    return steps_around_silence(SILENT, tmp_path_factory.mktemp("silence"))


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.head)
def test_a_step_without_trained_tokens_has_zero_gradient_and_the_next_step_trains(around_silence, case):
    silent, next_one = around_silence[case]
    assert silent["loss"] == 0
    assert silent["grad_norm"] == 0
    assert all(bool((gradient == 0).all()) for gradient in silent["gradients"].values())
    assert next_one["grad_norm"] > 0
    for name, weight in next_one["weights"].items():
        assert bool(weight.isfinite().all()), name
    assert any(not torch.equal(weight, silent["weights"][name]) for name, weight in next_one["weights"].items())
