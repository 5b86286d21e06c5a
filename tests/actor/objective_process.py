"""Runs an optimizer step of an objective that weights likelihoods in verl's own FSDP engine (gloo, CPU)."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from tests.actor.engine_process import VOCABULARY, Case, _engine, _model_folder, on_ranks

PROMPT, LENGTHS = 3, [4, 1, 6, 3, 5, 2, 3, 4]
UIDS = list("aaabbbcc")
SCORES = [1.0, 0, 0, 1, 1, 0, 0, 0]
DEMONSTRATIONS = [True, False, False, False, True, False, False, True]
# Positions of tool tokens in a rollout (row 2) and in a demonstration (row 4).
TOOL_TOKENS = {2: [3], 4: [1, 2]}


class Step(NamedTuple):
    """How the step's eight rows are divided, and verl's settings for it."""

    objective: str
    micro_batch: int = 2
    # The order in which the rows are distributed to ranks.
    order: tuple[int, ...] = tuple(range(8))
    head: str = "off"
    packed: bool = True
    # Number of padding rows after them.
    padding: int = 0
    # verl divides the micro-batches by tokens, balances them and orders them.
    dynamic: bool = False


def run(steps, processes, folder):
    """Run the steps; returns gradients, weights and metrics for each step and rank."""
    ranks = on_ranks(_train, steps, processes, folder)
    return {step: [results[i] for results in ranks] for i, step in enumerate(steps)}


def rows():
    """The step's rows: whole sequences, and log-probabilities of the policy that sampled."""
    generator = torch.Generator().manual_seed(5)
    sequences = [torch.randint(VOCABULARY, (PROMPT + length,), generator=generator) for length in LENGTHS]
    old = [-4 * torch.rand(length, generator=generator) - 1 for length in LENGTHS]
    return sequences, old


def mask_of(row):
    """The mask of a response: 1 on tokens that the policy wrote."""
    mask = torch.ones(LENGTHS[row], dtype=torch.int64)
    mask[TOOL_TOKENS.get(row, [])] = 0
    return mask


def model(folder):
    """The engine's model in fp64, with log-probabilities and entropies of the policy's tokens (a list for each row)."""
    from transformers import Qwen2ForCausalLM

    policy = Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    logps, entropies = [], []
    for row, sequence in enumerate(rows()[0]):
        logits = policy(sequence.unsqueeze(0)).logits[0, PROMPT - 1 : -1]
        every = (logits / 0.7).log_softmax(-1)
        own = mask_of(row).bool()
        logps.append(every.gather(-1, sequence[PROMPT:, None])[own, 0])
        entropies.append(-(every.exp() * every).sum(-1)[own])
    return policy, logps, entropies


def _train(step, folder):
    from verl.workers.config import FSDPActorConfig

    from hapo_verl.actor.loss import hapo_loss
    from hapo_verl.config import HapoConfig

    rank, ranks = dist.get_rank(), dist.get_world_size()
    engine = _engine(Case(packed=step.packed), step.head, folder, clip_grad=1e9)
    data = _batch(step, rank, ranks)
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode="seq-mean-token-mean" if step.objective == "real" else "token-mean",
    )
    hapo = HapoConfig.parse({"objective": {"name": step.objective}})
    with engine.train_mode(zero_grad_on_exit=False):
        output = engine.train_batch(data, partial(hapo_loss, config=config, hapo=hapo))
    return {
        "gradients": {
            name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
            for name, parameter in engine.module.named_parameters()
        },
        "weights": data["hapo_likelihood_weight"],
        "metrics": {
            name: [float(value) for value in getattr(metric, "values", [metric])]
            for name, metric in output["metrics"].items()
            if name.startswith("hapo/loss")
        },
        "folder": _model_folder(Case(), folder),
    }


def _batch(step, rank, ranks):
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack
    from verl.utils import tensordict_utils as tu

    sequences, old = rows()
    order = [*step.order, *range(8, 8 + step.padding)]
    sequences += [torch.ones(PROMPT + 1, dtype=torch.int64)] * step.padding
    old += [torch.zeros(1)] * step.padding
    mine = order[rank * len(order) // ranks : (rank + 1) * len(order) // ranks]
    jagged = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    mask = [mask_of(i) if i < 8 else torch.zeros(1, dtype=torch.int64) for i in mine]
    scores = [SCORES[i] if i < 8 else 0.0 for i in mine]
    # As verl writes a score: on the last token of the response.
    rewards = [
        torch.cat([torch.zeros(len(row) - 1), torch.tensor([score])]) for row, score in zip(mask, scores, strict=True)
    ]
    flags = [i < 8 and DEMONSTRATIONS[i] for i in mine]
    # Group-relative advantages are tested elsewhere. SRFT keeps those of demonstrations (1 here), REAL keeps none.
    advantage = [float(flag and step.objective == "srft") for flag in flags]
    advantages = [torch.full((len(row),), value) for row, value in zip(mask, advantage, strict=True)]
    data = TensorDict(
        {
            "prompts": jagged([sequences[i][:PROMPT] for i in mine]),
            "responses": jagged([sequences[i][PROMPT:] for i in mine]),
            "input_ids": jagged([sequences[i] for i in mine]),
            "position_ids": jagged([torch.arange(len(sequences[i])) for i in mine]),
            "loss_mask": jagged(mask),
            "response_mask": jagged(mask),
            "rm_scores": jagged(rewards),
            "old_log_probs": jagged([old[i] for i in mine]),
            "advantages": jagged(advantages),
            "hapo_demonstration": torch.tensor(flags),
        },
        batch_size=len(mine),
    )
    data["uid"] = NonTensorStack(*(UIDS[i] if i < 8 else f"padding{i}" for i in mine))
    tu.assign_non_tensor(
        data,
        temperature=0.7,
        use_remove_padding=step.packed,
        calculate_entropy=False,
        use_dynamic_bsz=step.dynamic,
        max_token_len_per_gpu=20,
        micro_batch_size_per_gpu=step.micro_batch,
        global_batch_size=8 + step.padding,
    )
    return data
