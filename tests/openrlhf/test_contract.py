"""What the executor relies on in OpenRLHF, checked with the files of the installed version. No GPU, vLLM or Ray.

OpenRLHF's modules that need a GPU's packages are not imported: single functions are taken out of their files.
"""

import __future__

import ast
import asyncio
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.openrlhf import conftest, standin

if not conftest.INSTALLED:
    pytest.skip("OpenRLHF is not installed: it needs a GPU's packages", allow_module_level=True)

from openrlhf.utils.agent import AgentExecutorBase, SingleTurnAgentExecutor

from hapo_verl.algo.policy_loss import Aggregation, Clip, DemonstrationShape, hapo_policy_loss
from hapo_verl.openrlhf.executor import HapoAgentExecutor

FOLDER = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])
SCRIPT = "\n".join(
    line
    for line in (conftest.RECIPES / "openrlhf" / "run.sh").read_text().splitlines()
    if not line.strip().startswith("#")
)
END = "<|im_end|>"
FAILURES = (f"1{END}", f"12{END}", "123456", f"1234{END}")


def taken(file, name, **names):
    """A function or class of one of OpenRLHF's files, with the names that it uses from its module."""
    tree = ast.parse((FOLDER / file).read_text())
    node = next(n for n in ast.walk(tree) if getattr(n, "name", None) == name)
    code = ast.Module(body=[node], type_ignores=[])
    exec(compile(code, file, "exec", flags=__future__.annotations.compiler_flag), names)
    return names[name]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_stand_in_has_openrlhfs_signatures():
    for ours, theirs in (
        (standin.SingleTurnAgentExecutor, SingleTurnAgentExecutor),
        (standin.AgentExecutorBase, AgentExecutorBase),
    ):
        assert parameters(ours.execute) == parameters(theirs.execute)
    assert parameters(standin.SingleTurnAgentExecutor) == parameters(SingleTurnAgentExecutor)
    assert parameters(HapoAgentExecutor.execute) == parameters(AgentExecutorBase.execute)


def test_the_stand_ins_rows_equal_openrlhfs(settings, tokenizer, prompted):
    reward, rows = settings().with_name("reward.py"), []
    for of in (standin.SingleTurnAgentExecutor, SingleTurnAgentExecutor):
        params = SimpleNamespace(max_tokens=6, logprobs=None)
        engine = conftest.Engine(tokenizer, f"210{END}")
        rows.append(asyncio.run(of(str(reward)).execute(prompted("012"), "210", params, 64, tokenizer, engine)))
    assert rows[0] == rows[1]


def test_openrlhf_loads_the_recipes_agent_file(tmp_path, settings):
    load = taken("trainer/ray/vllm_engine.py", "_load_agent_executor", AgentExecutorBase=AgentExecutorBase)
    settings()
    agent = tmp_path / "agent.py"
    agent.write_text((conftest.RECIPES / "openrlhf" / "agent.py").read_text())
    assert isinstance(load(str(agent)), HapoAgentExecutor)


def started(executor, tokenizer, prompt, label):
    """A group's rows, started by OpenRLHF's own vLLM actor."""
    generate_responses = taken("trainer/ray/vllm_engine.py", "generate_responses", asyncio=asyncio)
    engine = conftest.Engine(tokenizer, *FAILURES)
    actor = SimpleNamespace(executor=executor, generate=engine.generate)
    params = SimpleNamespace(max_tokens=6, logprobs=None)
    return asyncio.run(generate_responses(actor, prompt, label, params, 64, tokenizer, num_samples=4))


@pytest.fixture
def rows(executor, tokenizer, prompted):
    label = json.dumps({"label": "210", "demonstration": "210"})
    return started(executor(), tokenizer, prompted("012"), label)


def test_the_executor_recognises_a_group_that_openrlhfs_actor_starts(rows, written):
    assert written(rows) == [f"1{END}", f"12{END}", f"210{END}", f"1234{END}"]


def test_openrlhf_makes_a_batch_from_the_rows(rows):
    """The demonstration's tokens, masks, rewards and metrics are treated like those of samples."""
    experience = taken("trainer/ppo_utils/samples_generator.py", "_process_response_into_experience",
                       torch=torch, Experience=SimpleNamespace)  # fmt: skip
    made = [experience(None, row, max_len=64) for row in rows]
    assert [one.rewards.tolist() for one in made] == [[0.0], [0.0], [1.0], [0.0]]
    assert [one.response_length.item() for one in made] == [2, 3, 4, 5]
    assert [int(one.action_mask.sum()) for one in made] == [2, 3, 4, 5]
    assert not any(one.truncated.item() for one in made)
    assert {tuple(one.info) for one in made} == {tuple(made[0].info)}
    assert all(value.numel() == 1 for one in made for value in one.info.values())
    assert made[2].info["hapo/injected/group_share"].item() == 1


def test_at_ratio_1_openrlhfs_loss_has_the_gradient_of_the_log_likelihood_loss():
    """OpenRLHF's old policy is its actor before the update, for demonstrations too, so the ratio begins at 1."""
    masked_mean = taken("models/utils.py", "masked_mean", torch=torch)
    aggregate = taken("models/loss.py", "aggregate_loss", torch=torch, masked_mean=masked_mean)
    policy_loss = taken("models/loss.py", "PolicyLoss", torch=torch, nn=torch.nn, masked_mean=masked_mean,
                        aggregate_loss=aggregate)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    logp_BT = -3 * torch.rand(4, 5, generator=generator)
    mask_BT = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    advantage_BT = torch.tensor([-0.5, -0.5, 1.5, -0.5]).unsqueeze(1).expand(4, 5)
    gradients = []
    for of in ("openrlhf", "hapo"):
        policy_BT = logp_BT.clone().requires_grad_()
        if of == "openrlhf":
            loss = policy_loss()(policy_BT, logp_BT, advantage_BT, mask_BT, batch_num_tokens=14.0)[0]
        else:
            loss = hapo_policy_loss(
                policy_BT,
                logp_BT,
                advantage_BT,
                mask_BT,
                torch.tensor([False, False, True, False]),
                shape=DemonstrationShape("power", float("inf"), 0.0),
                clip=Clip(low=0.2, high=0.2, dual=float("inf")),
                aggregation=Aggregation("token-mean", batch_num_tokens=14),
            ).loss
        loss.backward()
        gradients.append(policy_BT.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        # Each call of the actor has its own sampling parameters and covers all samples of a prompt.
        ("trainer/ppo_utils/samples_generator.py", "llm_engine.generate_responses.remote("),
        ("trainer/ppo_utils/samples_generator.py", "num_samples=n_samples,"),
        (
            "trainer/ppo_utils/samples_generator.py",
            "logprobs=1 if self.args.algo.advantage.is_correction_enable else None",
        ),
        # The statistics are those of the paper.
        (
            "trainer/ppo_utils/experience_maker.py",
            "(rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True)",
        ),
        # The policy before the update is the actor's own forward pass.
        ("trainer/ppo_utils/experience_maker.py", "samples.action_log_probs = action_log_probs"),
    ],
)
def test_a_line_that_the_documentation_relies_on_is_there(file, read):
    assert read in (FOLDER / file).read_text()


def test_openrlhf_has_the_flags_of_the_launch_script():
    source = (FOLDER / "cli" / "train_ppo_ray.py").read_text().replace("--{prefix}.", "--actor.")
    flags = set(re.findall(r"^  (?:.* )?(--[a-z_]+\.[a-z_.]+)", SCRIPT, flags=re.M)) | set(
        re.findall(r"(?<= )(--[a-z_]+\.[a-z_.]+)(?= )", SCRIPT)
    )
    assert len(flags) > 30
    assert not [flag for flag in flags if f'"{flag}"' not in source]
