"""verl's worker, driver and actor give the same results on given completions as TRL's trainer (`golden_step.json`)."""

import asyncio
from types import SimpleNamespace

import pytest

from tests.actor.engine_process import on_ranks
from tests.trl import golden_step
from tests.trl.conftest import PER_GROUP, rows

MODES = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The steps in verl's trainer, by the names of the cases."""
    folder = tmp_path_factory.mktemp("steps")
    (found,) = on_ranks(_step, list(golden_step.CASES), 1, folder)
    return dict(zip(golden_step.CASES, found, strict=True))


@pytest.mark.parametrize("name", golden_step.CASES)
def test_rows_advantages_loss_and_gradient_equal_those_of_trls_trainer(steps, name):
    golden_step.assert_same(steps[name], golden_step.recorded()[name])


def _step(name, folder):
    """A step of verl's trainer, in the form in which TRL's is recorded."""
    import transfer_queue as tq

    from tests.driver import step_process as process

    case, recorded = golden_step.CASES[name], golden_step.recorded()[name]
    policy, tokenizer = golden_step.model()
    policy.save_pretrained(f"{folder}/model")
    one = process.Run((*_overrides(case), *process.WHOLE) if case.drift else _overrides(case), model=f"{folder}/model")
    config = process._config(one)
    worker, hapo = process._worker(one, config, folder)
    queue = process.Queue()
    tq.kv_batch_get, tq.kv_batch_put = queue.get, queue.put
    _write_rows(queue, hapo, tokenizer, recorded)
    keys, gradients = list(queue.rows), {}
    batch = tq.KVBatchMeta(keys=keys, tags=list(queue.tags.values()), partition_id="train")
    trainer = process._trainer(one, config, hapo, worker, queue)
    trainer.replay_buffer = SimpleNamespace(sample=lambda **_: (batch, {}))

    score, optimize = trainer.actor_rollout_wg.compute_log_prob, worker.engine.optimizer_step

    def drifting(batch):
        scored = score(batch)
        for key in batch.keys:
            queue.rows[key]["log_probs"] = golden_step.drifted(queue.rows[key]["log_probs"], case.drift)
        return scored

    def noting():
        for weight, parameter in worker.engine.module.named_parameters():
            gradients[weight] = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)().flatten()
        return optimize()

    trainer.actor_rollout_wg.compute_log_prob, worker.engine.optimizer_step = drifting, noting
    metrics = {}
    trainer._step_once(metrics, trainer.timing_raw, golden_step.GROUPS)
    done = [queue.rows[key] for key in keys]
    return {
        "prompts": [row["prompts"].tolist() for row in done],
        "responses": [row["responses"].tolist() for row in done],
        "demonstration": [bool(row["hapo_demonstration"]) for row in done],
        "advantages": [float(row["advantages"][0]) for row in done],
        "loss": float(metrics["actor/pg_loss"]),
        "gradients": {weight: golden_step.digits(gradient) for weight, gradient in gradients.items()},
    }


def _overrides(case):
    loss = [f"hapo.loss.{key}={value}" for key, value in case.loss.items()]
    return (
        "+hapo=paper",
        "hapo.gate.threshold=" + str(golden_step.GATE["gate"]["threshold"]),
        "hapo.injection.mode=replace",
        f"hapo.advantage.statistics={case.statistics}",
        *loss,
        f"algorithm.norm_adv_by_std_in_grpo={str(case.scale_rewards == 'group').lower()}",
        f"data.train_batch_size={golden_step.GROUPS}",
        f"data.max_response_length={golden_step.LONGEST}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={golden_step.GROUPS}",
        f"actor_rollout_ref.rollout.n={PER_GROUP}",
        f"actor_rollout_ref.rollout.temperature={case.temperature}",
        f"actor_rollout_ref.actor.loss_agg_mode={MODES[case.loss_type]}",
        f"actor_rollout_ref.actor.loss_scale_factor={golden_step.LONGEST}",
        "actor_rollout_ref.actor.use_kl_loss=false",
        "actor_rollout_ref.actor.entropy_coeff=0",
    )


def _write_rows(queue, hapo, tokenizer, recorded):
    """Let the agent loop worker close the groups of the recorded completions."""
    from omegaconf import OmegaConf
    from verl.experimental.agent_loop import AgentLoopOutput

    from hapo_verl.rollout import worker as rollout

    worker = object.__new__(rollout.HapoAgentLoopWorker)
    worker.config = OmegaConf.create({"data": {}, "actor_rollout_ref": {"rollout": {"n": PER_GROUP}}})
    worker.tokenizer, worker.processor = tokenizer, None
    worker.rollout_config = SimpleNamespace(response_length=golden_step.LONGEST)
    worker.model_config = SimpleNamespace(generation_config=None)
    worker._hapo, worker._groups, worker._verdicts = hapo, {}, {}

    async def score(outputs, kwargs):
        text = tokenizer.decode(outputs[-1].response_ids, skip_special_tokens=True)
        outputs[-1].reward_score = float(text == kwargs["answer"])
        outputs[-1].extra_fields["reward_extra_info"] = {}

    async def put(keys, fields, tags, partition_id):
        queue.put(keys, partition_id, fields, tags)

    async def close(group, task, outputs):
        for session, output in enumerate(outputs):
            fields = {"uid": f"p{task['index']}", "session_id": session, "index": task["index"], "global_steps": 1}
            fields |= {"raw_prompt": task["prompt"], "answer": task["answer"]}
            await score([output], fields)
            group.sessions[session] = rollout._Session([output], fields)
        await worker._close_group(group)

    worker._compute_score, rollout.tq.async_kv_batch_put = score, put
    outputs = [
        AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=written,
            response_mask=[1] * len(written),
            response_logprobs=[0.0] * len(written),
            num_turns=2,
            metrics={},
            extra_fields={},
        )
        for prompt, written in zip(recorded["prompts"], recorded["written"], strict=True)
    ]
    for number, task in enumerate(rows(golden_step.GROUPS)):
        group = rollout._Group(PER_GROUP, task["demonstration"], {"threshold": hapo.gate.threshold})
        mine = outputs[number * PER_GROUP : (number + 1) * PER_GROUP]
        asyncio.run(close(group, task | {"index": number}, mine))
