"""Loss and gradient of every preset on a recorded batch: the product, the paper's formula in fp64, and stored goldens.

The product's result comes from the same steps as in a launch: configuration by Hydra, situations by the gatekeeper,
groups closed by the agent loop worker, DAPO's filter by verl's replay buffer, advantages by the trainer, weights of the
likelihoods, then the loss. TransferQueue is replaced by a dictionary, and the outputs of the model are recorded.
"""

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import transfer_queue as tq
from tensordict import TensorDict
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass

import hapo_verl
from hapo_verl.actor.likelihood import weigh_likelihoods
from hapo_verl.actor.loss import hapo_loss
from hapo_verl.config import HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper
from hapo_verl.driver.idle_rows import Savings
from hapo_verl.driver.trainer import HapoTrainerSync
from hapo_verl.protocol.trace import Trace
from hapo_verl.rollout.worker import HapoAgentLoopWorker, _Group, _Session
from tests.actor.golden_batch import FILE, ROLLOUTS, evaluate, read, record
from tests.actor.golden_formulas import FORMULAS, LIMIT, normalised

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import tiny_model

ON_FILE = json.loads(FILE.read_text())
PRESETS = Path(hapo_verl.__file__).parent / "presets" / "hapo"
TOKENIZER = tiny_model.make_tokenizer("0123456789")
# A formula uses every row of the step, with or without a gradient.
EVERY_ROW = Savings(idle_rows="a golden", idle_scores="a golden", old_log_probs="a golden")
# Rows of the step in the order of the queue, cut into micro-batches.
CUTS = {
    "halves": lambda rows: [range(rows // 2), range(rows // 2, rows)],
    "single rows": lambda rows: [[row] for row in range(rows)],
    "shuffled and uneven": lambda rows: torch.randperm(rows, generator=torch.Generator().manual_seed(3)).split(
        [1, 2, 5, rows - 8]
    ),
}


class Queue:
    """A dictionary that replaces TransferQueue, with the methods that a step uses."""

    def __init__(self):
        self.rows, self.tags = defaultdict(dict), {}

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        self.tags |= zip(keys, tags, strict=True)
        self.kv_batch_put(keys, partition_id, fields)

    def kv_batch_put(self, keys, partition_id, fields):
        for name in list(fields.keys()):
            for key, value in zip(keys, fields[name], strict=True):
                self.rows[key][name] = value

    def kv_batch_get(self, keys, partition_id, select_fields):
        return tu.list_of_dict_to_tensordict([{name: self.rows[key][name] for name in select_fields} for key in keys])


class Batch(NamedTuple):
    """A replacement of verl's KVBatchMeta, with the fields that the trainer reads for advantages."""

    keys: list
    tags: list
    partition_id: str = "train"

    def __len__(self):
        return len(self.keys)


class Step(NamedTuple):
    """What the actor gets in one optimizer step; outputs are for each row, over its whole sequence."""

    config: object
    hapo: HapoConfig
    data: TensorDict
    places: list
    log_probs: list
    entropy: list


class RecordedEngine:
    """A replacement of verl's engine for `weigh_likelihoods`, with recorded outputs."""

    def __init__(self, step):
        self.step = step

    def infer_batch(self, data):
        output = {"log_probs": jagged(self.step.log_probs)}
        if tu.get_non_tensor_data(data=data, key="calculate_entropy", default=False):
            output["entropy"] = jagged(self.step.entropy)
        return {"model_output": output}

    def get_data_parallel_group(self):
        return None


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """A process group with only this process."""
    rendezvous = tmp_path_factory.mktemp("goldens") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def step(launch, monkeypatch):
    """Run the first step of a launch on the recorded batch."""

    def build(line):
        preset, *others = line.split()
        others += [f"data.max_response_length={LIMIT}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
        config = launch(
            *others, preset=[f"+hapo={preset}", f"actor_rollout_ref.rollout.n={ROLLOUTS}", "hapo.trace_dir=null"]
        )
        queue = Queue()
        for name in ("async_kv_batch_put", "kv_batch_put", "kv_batch_get"):
            monkeypatch.setattr(tq, name, getattr(queue, name))
        trainer = object.__new__(HapoTrainerSync)
        trainer.config, trainer.hapo, trainer.trace = config, HapoConfig.parse(config.hapo), Trace(None)
        trainer._leaves_out, trainer._heard, trainer._rollouts = EVERY_ROW, True, None
        trainer.gatekeeper, trainer.global_steps = Gatekeeper(trainer.hapo, total_steps=100), 1
        roll_out(trainer)
        keys = kept(trainer, queue)
        score_rows(queue, keys)
        trainer._compute_advantage(Batch(keys, [queue.tags[key] for key in keys]), {})
        return an_optimizer_step(trainer, queue, keys)

    return build


def roll_out(trainer):
    """Close the recorded groups as the agent loop worker does, in the situations that the trainer gives them."""
    worker = object.__new__(HapoAgentLoopWorker)
    worker.config, worker._hapo, worker._verdicts = trainer.config, trainer.hapo, {}
    worker.tokenizer, worker.processor = TOKENIZER, None
    worker.rollout_config = trainer.config.actor_rollout_ref.rollout
    worker.model_config = SimpleNamespace(generation_config=None)

    async def score(outputs, kwargs):
        # Rollouts have recorded rewards, so this is a demonstration.
        outputs[-1].reward_score = 1.0

    worker._compute_score = score
    groups = ON_FILE["groups"]
    prompts = {"raw_prompt": [str(number) for number in range(len(groups))]}
    situations = trainer.gatekeeper.situations(prompts, trainer.global_steps, prompt_column="prompt")
    for number, (group, situation) in enumerate(zip(groups, situations, strict=True)):
        text = "7" * (len(group["demonstration"]["policy"]) - 1)
        closing = _Group(ROLLOUTS, text, situation, settled=ROLLOUTS)
        for session, row in enumerate(group["rollouts"]):
            fields = {"uid": f"group{number}", "session_id": session, "index": number, "global_steps": 1}
            closing.sessions[session] = _Session([an_output(number, row)], fields)
        asyncio.run(worker._close_group(closing))


def an_output(number, row):
    length = len(row["policy"])
    tokens = TOKENIZER.encode("1" * length, add_special_tokens=False)
    if not row.get("truncated"):
        tokens[-1] = TOKENIZER.eos_token_id
    return AgentLoopOutput(
        # Prompts of different lengths.
        prompt_ids=TOKENIZER.encode("1" * (number + 2), add_special_tokens=False),
        response_ids=tokens,
        response_mask=[int(value is not None) for value in row["policy"]],
        reward_score=float(row["reward"]),
        num_turns=2,
        metrics={},
    )


def kept(trainer, queue):
    """The keys of the rows that verl's replay buffer returns."""
    buffer = object.__new__(ReplayBuffer)
    buffer.filter_groups_metric = trainer._resolve_filter_groups_metric()
    buffer.partitions, buffer._dapo_classification_cache = {"train": queue.tags}, defaultdict(dict)
    buffer.finished_keys = {"train": {key.split("_")[0] for key in queue.tags}}
    evicted, _ = buffer._dapo_filtered_keys("train")
    return [key for key in queue.tags if key.split("_")[0] not in evicted]


def recorded_at(queue, key):
    """The position of a row, and its record."""
    group, session, _ = key.removeprefix("group").split("_")
    place = int(group), int(session), bool(queue.rows[key]["hapo_demonstration"])
    of_group = ON_FILE["groups"][place[0]]
    return place, of_group["demonstration"] if place[2] else of_group["rollouts"][place[1]]


def score_rows(queue, keys):
    """Write old log-probs equal to the rollout log-probs, so that rollout correction changes nothing."""
    for key in keys:
        old = fp32(recorded_at(queue, key)[1]["old"])
        queue.rows[key] |= {"old_log_probs": old, "rollout_log_probs": old}


def an_optimizer_step(trainer, queue, keys):
    places, log_probs, entropy = [], [], []
    for key in keys:
        row = queue.rows[key]
        place, recorded = recorded_at(queue, key)
        assert len(row["responses"]) == len(recorded["policy"])
        # A model scores every token of a sequence, each at the position before it.
        before = [None] * (len(row["prompts"]) - 1)
        places.append(place)
        for values, name in ((log_probs, "policy"), (entropy, "entropy")):
            values.append(fp32([*before, *recorded[name], None], unread=float("nan")))
    names = ["prompts", "responses", "response_mask", "loss_mask", "rm_scores", "advantages", "hapo_demonstration"]
    data = queue.kv_batch_get(keys, "train", [*names, "uid", "old_log_probs"])
    # verl's engine counts tokens in this way.
    tokens = int(data["loss_mask"].values().sum())
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(keys))
    actor = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.actor)
    step = Step(actor, trainer.hapo, data, places, log_probs, entropy)
    if trainer.hapo.objective.weighs_likelihood:
        weigh_likelihoods(RecordedEngine(step), data, trainer.hapo.objective)
    return step


def fp32(values, unread=-9.0):
    return torch.tensor([unread if value is None else value for value in values])


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class Outcome(NamedTuple):
    """The loss, and the gradients by row, for the response's tokens that train."""

    loss: float
    of_policy: dict
    of_entropy: dict
    # The objective's own loss, if it has one.
    own_loss: float | None


def trained(step, micro_batches):
    """Train the step as verl's engine does: the losses of the micro-batches are added up."""
    with_entropy = step.config.calculate_entropy or step.config.entropy_coeff != 0
    log_probs, entropy = ([row.clone().requires_grad_() for row in rows] for rows in (step.log_probs, step.entropy))
    total, own_loss = 0.0, None
    for rows in micro_batches:
        rows = torch.as_tensor(rows)
        output = {"log_probs": jagged([log_probs[row] for row in rows])}
        if with_entropy:
            output["entropy"] = jagged([entropy[row] for row in rows])
        data = tu.index_select_tensor_dict(step.data, rows)
        loss, metrics = hapo_loss(config=step.config, hapo=step.hapo, model_output=output, data=data)
        loss.backward()
        total += loss.item()
        own_loss = metrics.get(f"hapo/loss/{step.hapo.objective.name}", own_loss)
    return Outcome(
        total,
        {place: of_response(step, i, log_probs[i].grad) for i, place in enumerate(step.places)},
        {place: of_response(step, i, entropy[i].grad) for i, place in enumerate(step.places)},
        None if own_loss is None else own_loss.aggregate(),
    )


def of_response(step, row, gradient):
    """The gradients of the tokens that train; checks that no other token has one."""
    if gradient is None:
        gradient = torch.zeros_like(step.entropy[row])
    mask = step.data["response_mask"].unbind()[row].bool()
    predicting = torch.zeros(len(gradient), dtype=torch.bool)
    predicting[len(gradient) - 1 - len(mask) : -1] = mask
    assert not gradient[~predicting].any()
    return gradient[predicting]


def assert_close(ours, expected, bound):
    """Check that each entry differs by at most `bound` times the largest entry of the batch."""
    assert list(ours) == list(expected)
    ours, expected = (torch.cat(list(of_rows.values())).double() for of_rows in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("line", FORMULAS)
def test_a_presets_loss_and_gradient_equal_its_papers_formula_in_fp64(step, line):
    step, formula = step(line), evaluate(line, ON_FILE)
    ours = trained(step, [range(len(step.places))])
    assert_close(ours.of_policy, formula.of_policy, 5e-7)
    assert_close(ours.of_entropy, formula.of_entropy, 5e-7)
    # REAL differentiates a sum whose value differs from its loss.
    loss = ours.loss if ours.own_loss is None else ours.own_loss
    assert loss == pytest.approx(formula.loss, rel=2e-6)


@pytest.mark.parametrize("line", FORMULAS)
def test_a_presets_loss_and_gradient_do_not_depend_on_the_micro_batches(step, line):
    step = step(line)
    whole = trained(step, [range(len(step.places))])
    for name, cut in CUTS.items():
        parts = trained(step, cut(len(step.places)))
        assert parts.loss == pytest.approx(whole.loss, rel=2e-6), name
        assert_close(parts.of_policy, whole.of_policy, 2e-7)
        assert_close(parts.of_entropy, whole.of_entropy, 2e-7)


@pytest.mark.parametrize("line", FORMULAS)
def test_a_formula_gives_its_stored_golden(line):
    golden, now = ON_FILE["goldens"][line], evaluate(line, ON_FILE).golden()
    assert now["loss"] == pytest.approx(golden["loss"], rel=1e-8)
    assert list(now["gradient"]) == list(golden["gradient"])
    for place, numbers in golden["gradient"].items():
        assert now["gradient"][place] == pytest.approx(numbers, rel=1e-8, abs=1e-15), place


def test_every_preset_has_a_golden_and_the_batch_is_what_the_script_writes():
    assert {line.split()[0] for line in FORMULAS} == {path.stem for path in PRESETS.glob("*.yaml")}
    assert list(ON_FILE["goldens"]) == list(FORMULAS)
    assert {name: value for name, value in ON_FILE.items() if name != "goldens"} == record()


def test_the_batch_reaches_every_branch_of_the_clipped_surrogate():
    reached = {(row_sign, band): 0 for row_sign in (-1, 1) for band in range(5)}
    for group in read(ON_FILE)[0]:
        for row, advantage in zip(group, normalised(group), strict=True):
            for ratio in (row.policy - row.old).exp().tolist():
                if advantage:
                    # Below the range, within it, above it, above DAPO's bound as well, above the dual clip.
                    reached[1 if advantage > 0 else -1, sum(ratio > bound for bound in (0.8, 1.2, 1.28, 3.0))] += 1
    assert all(reached.values()), reached


def test_the_formulas_import_nothing_from_the_product():
    code = (
        "import sys, tests.actor.golden_batch;"
        "sys.exit(any(name.split('.')[0] in ('hapo_verl', 'hapo_kernels', 'verl') for name in sys.modules))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
