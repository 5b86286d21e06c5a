"""Synthetic Success Injection in verl's agent loop worker.

The worker keeps the scored outputs of a prompt's sessions until the last session has settled, decides, and writes the
group. That is inside the last session's own task, before verl publishes the prompt: every trainer mode passes here,
`filter_groups` sees the group after the injection, and balancing and log-probs treat a demonstration like any row.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import torch
import transfer_queue as tq
from verl.experimental.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from hapo_verl.algo.demonstration import Refusal, Response
from hapo_verl.algo.gate import Situation, confidence, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, is_success, worst_rollout
from hapo_verl.algo.own_successes import unpacked
from hapo_verl.config import HapoConfig
from hapo_verl.protocol.rows import APPENDED, DEMONSTRATION, GROUP, OWN_SUCCESS, ROLLOUTS, SITUATION
from hapo_verl.rollout.reward import RewardError, finite_number
from hapo_verl.rollout.tokens import ChatFormat
from hapo_verl.rollout.tool_loop import ToolLoop

logger = logging.getLogger("verl." + __name__)

# Demonstrations of a worker whose reward is asked for a second time.
LOOKED_AT_TWICE = 16


@dataclass
class _Session:
    """One scored rollout: its outputs (several in some multi-turn loops) and the row fields verl gave it."""

    outputs: list[AgentLoopOutput]
    fields: dict[str, Any]


class _Row(NamedTuple):
    """A row of TransferQueue."""

    key: str
    fields: dict[str, Any]
    tag: dict[str, Any]


@dataclass
class _Group:
    """A prompt whose sessions are not all settled yet."""

    expected: int
    demonstration: Any
    situation: dict[str, Any] = field(default_factory=dict)
    agent_name: str | None = None
    # The reward function has said success of its demonstration once, and once not.
    unsteady: bool = False
    # Step in which the policy itself has written what was injected.
    own_step: int | None = None
    settled: int = 0
    sessions: dict[int, _Session] = field(default_factory=dict)


# The plain class under verl's Ray actor.
_Worker: type[AgentLoopWorker] = AgentLoopWorkerTQ.__ray_actor_class__  # pyright: ignore[reportAttributeAccessIssue]


class HapoAgentLoopWorker(_Worker):  # pyright: ignore[reportGeneralTypeIssues]
    """verl's agent loop worker with a gate at the end of every group of training rollouts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hapo = HapoConfig.parse(self.config.hapo)
        self._groups: dict[str, _Group] = {}
        # What the reward function said of each demonstration, by a hash of its tokens.
        self._verdicts: dict[int, bool] = {}

    @functools.cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat.of(
            self.tokenizer,
            generation_config=getattr(self.model_config, "generation_config", None),
            template_kwargs=dict(self.config.data.get("apply_chat_template_kwargs", {}) or {}),
            tool_loop=ToolLoop(
                self.config,
                self.tokenizer,
                load_tools=lambda: self.tools,
                load_model=lambda: (self.hf_model_type, self.processor),
            ),
        )

    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        # Neither the agent loop nor the reward function nor the trained row gets to see the demonstration's text.
        demonstration = prompt.pop(self._hapo.demonstration_key, None)
        situation = prompt.pop(SITUATION, {})
        if trajectory["validate"]:
            return await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        expected = prompt.get(ROLLOUTS, self.config.actor_rollout_ref.rollout.n)
        self._groups[prompt["uid"]] = _Group(int(expected), demonstration, situation, prompt.get("agent_name"))
        try:
            return await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            del self._groups[prompt["uid"]]

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs,
    ) -> None:
        try:
            await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs)
        finally:
            # A session that raises never reaches postprocess, so sessions are counted here.
            group = None if trajectory["validate"] else self._groups.get(kwargs["uid"])
            if group is not None:
                group.settled += 1
                if group.settled == group.expected:
                    await self._close_group(group)

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        outputs = output if isinstance(output, list) else [output]
        if validate or not outputs:
            await super()._agent_loop_postprocess(outputs, validate, **kwargs)
            return
        # What this raises ends the session alone: verl logs it and trains on the others.
        await self._score(outputs, kwargs)
        self._groups[kwargs["uid"]].sessions[kwargs["session_id"]] = _Session(outputs, kwargs)

    async def _close_group(self, group: _Group) -> None:
        """Write the group's rows, with the demonstration where the gate fires and the demonstration holds."""
        if not group.sessions:
            return
        # Sessions end in any order; nothing that follows depends on it.
        group.sessions = dict(sorted(group.sessions.items()))
        try:
            rows = await self._injected_rows(group)
        except Exception:
            # The rollouts are paid for: train on them as they are, say it loudly, count it (hapo/refused/error).
            logger.exception("hapo: a group is trained without injection because closing it failed")
            rows = self._all_rows(group, _describe([], outcome="error"))
        # A field that one row of a batch lacks disappears for all of them, here as everywhere in TransferQueue.
        common = set.intersection(*(set(row.fields) for row in rows))
        # One put for the group: with one put a row, puts were a third of this worker's time.
        await tq.async_kv_batch_put(
            keys=[row.key for row in rows],
            fields=list_of_dict_to_tensordict([{name: row.fields[name] for name in common} for row in rows]),
            tags=[row.tag for row in rows],
            partition_id="train",
        )

    async def _injected_rows(self, group: _Group) -> list[_Row]:
        rollouts = {i: rollout for i, session in group.sessions.items() if (rollout := self._rollout(session))}
        if len(rollouts) < max(2, len(group.sessions)):
            return self._all_rows(group, _describe([], outcome="not_gated"))
        fields = group.sessions[next(iter(rollouts))].fields
        rng = random.Random(f"{self._hapo.seed}/{fields['global_steps']}/{fields['index']}")
        description = self._gate(list(rollouts.values()), dict(group.situation), rng)
        if description["outcome"] != "admitted":
            return self._all_rows(group, description)

        worst = list(rollouts)[worst_rollout(list(rollouts.values()), rng)]
        demonstration = await self._demonstration(group, group.sessions[worst])
        if isinstance(demonstration, Refusal):
            return self._all_rows(group, description | {"outcome": demonstration.reason, "unsteady": group.unsteady})
        description |= {"outcome": "injected", "unsteady": group.unsteady, "own_step": group.own_step}
        if self._hapo.injection.mode == "append":
            # A session of its own, behind the last one.
            extra = group.sessions[worst].fields | {"session_id": group.expected}
            return self._all_rows(group, description, extra=_Session([demonstration], extra))
        return self._all_rows(group, description | {"replaced": worst}, replaced=(worst, demonstration))

    def _all_rows(
        self,
        group: _Group,
        description: dict[str, Any],
        *,
        replaced: tuple[int, AgentLoopOutput] | None = None,
        extra: _Session | None = None,
    ) -> list[_Row]:
        """The group's rows, with a demonstration in one session's place or as an extra one."""
        fields = next(iter(group.sessions.values())).fields
        description = {
            "index": _plain(fields["index"]),
            "data_source": _plain(fields.get("data_source")),
            **description,
        }

        def rows_of(session: _Session, outputs: list[AgentLoopOutput], *, demonstration: bool) -> Iterator[_Row]:
            return self._rows(session, outputs, {DEMONSTRATION: torch.tensor(demonstration), GROUP: description})

        rows: list[_Row] = []
        for session_id, session in group.sessions.items():
            if replaced is not None and session_id == replaced[0]:
                rows += rows_of(session, [replaced[1]], demonstration=True)
            else:
                own = self._own_success(session) if description["key"] is not None else {}
                rows += (
                    row._replace(tag=row.tag | own) for row in rows_of(session, session.outputs, demonstration=False)
                )
        if extra is not None:
            rows += (
                row._replace(tag=row.tag | {APPENDED: True})
                for row in rows_of(extra, extra.outputs, demonstration=True)
            )
        return rows

    def _rows(self, session: _Session, outputs: list[AgentLoopOutput], extra: dict[str, Any]) -> Iterator[_Row]:
        """A session's outputs as rows of TransferQueue, field for field as verl's worker writes them, and `extra`."""
        if outputs[-1].reward_score is not None:
            for output in outputs[:-1]:
                output.reward_score = outputs[-1].reward_score
                output.extra_fields["reward_extra_info"] = outputs[-1].extra_fields["reward_extra_info"]
        for index, output in enumerate(outputs):
            fields = output.as_dict() | session.fields | extra
            fields.pop("multi_modal_data", None)
            input_ids = torch.cat([fields["prompts"], fields["responses"]])
            images = self._compute_multi_modal_inputs(output, input_ids)
            batch_of_one = input_ids.unsqueeze(0)
            positions = self._compute_position_ids(batch_of_one, torch.ones_like(batch_of_one), images).squeeze(0)
            fields |= {
                "loss_mask": fields["response_mask"],
                "input_ids": input_ids,
                "position_ids": positions,
                "multi_modal_inputs": images,
            }
            yield _Row(
                key=f"{session.fields['uid']}_{session.fields['session_id']}_{index}",
                fields=fields,
                tag={
                    "status": "success",
                    "prompt_len": len(fields["prompts"]),
                    "response_len": len(fields["responses"]),
                    "seq_len": len(input_ids),
                    "global_steps": session.fields["global_steps"],
                    "min_global_steps": output.extra_fields.get("min_global_steps"),
                    "max_global_steps": output.extra_fields.get("max_global_steps"),
                },
            )

    def _gate(self, rollouts: list[Rollout], given: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        key, _ = given.pop("key", None), given.pop("own", None)
        situation = Situation(**given)
        successes = sum(rollout.success for rollout in rollouts)
        firing = firing_probabilities(self._hapo.gate.name, len(rollouts), situation)
        fired = fires(firing, successes, rng)
        return _describe(
            rollouts,
            outcome="admitted" if fired and situation.admitted else "not_admitted" if fired else "not_fired",
            fired=fired,
            firing=firing,
            threshold=situation.threshold,
            confidence=confidence(
                successes,
                len(rollouts),
                prior_success=situation.prior_success,
                prior_failure=situation.prior_failure,
            ),
            key=key,
        )

    async def _score(self, outputs: list[AgentLoopOutput], fields: dict[str, Any]) -> None:
        """verl's call of the reward function; in time, and with a number for its result.

        Raises:
            RewardError: where it is late, or what it returns is no number that a group can be compared by.
        """
        limit = self._hapo.reward_timeout
        try:
            await asyncio.wait_for(self._compute_score(outputs, kwargs=fields), limit)
        except asyncio.TimeoutError:
            raise RewardError(
                f"hapo.reward_timeout={limit}: the reward function has not answered in this time for data_source="
                f"{fields.get('data_source')}. Make it faster, or give it longer."
            ) from None
        final = outputs[-1]
        if final.reward_score is not None:
            final.reward_score = finite_number(final.reward_score, "score")
        extra = final.extra_fields.get("reward_extra_info") or {}
        for name in ("score", "acc"):
            # verl keeps what the function returned beside its score.
            if extra.get(name) is not None:
                extra[name] = finite_number(extra[name], name)

    def _rollout(self, session: _Session) -> Rollout | None:
        """A session as the gate sees it; None where nothing has scored it."""
        final = session.outputs[-1]
        if final.reward_score is None:
            return None
        limit = self.rollout_config.response_length
        return Rollout(
            score=float(final.reward_score),
            success=self._succeeded(final, final.reward_score),
            truncated=len(final.response_ids) >= limit and final.response_ids[-1] not in self._chat.end_tokens,
            length=sum(len(output.response_ids) for output in session.outputs),
        )

    def _succeeded(self, output: AgentLoopOutput, score: float) -> bool:
        accuracy = (output.extra_fields.get("reward_extra_info") or {}).get("acc")
        return is_success(score, accuracy, self._hapo.success_threshold)

    def _own_success(self, session: _Session) -> dict[str, Any]:
        """The tag of a session that the policy may be reminded of: one success that it has brought to its end."""
        if not self._hapo.demonstrations.remembers or len(session.outputs) > 1:
            return {}
        rollout, (output,) = self._rollout(session), session.outputs
        ended = bool(output.response_ids) and output.response_ids[-1] in self._chat.end_tokens
        if rollout is None or not rollout.success or not ended:
            return {}
        return {OWN_SUCCESS: [output.num_turns // 2, len(output.extra_fields.get("tool_rewards") or ())]}

    async def _demonstration(self, group: _Group, replaced: _Session) -> AgentLoopOutput | Refusal:
        """The demonstration as an output like the one it replaces, verified by the run's own reward function."""
        own = group.situation.get("own")
        if self._hapo.demonstrations.needs_column:
            of_column = await self._of_column(group, replaced)
            if not own or not isinstance(of_column, Refusal):
                return of_column
        return await self._of_own_past(group, own, replaced) if own else Refusal("missing")

    async def _of_own_past(self, group: _Group, own: bytes, replaced: _Session) -> AgentLoopOutput | Refusal:
        """What the policy itself has solved the prompt with: a success by then, whose reward is asked for once."""
        response, step = unpacked(own)
        if len(response.tokens) > self.rollout_config.response_length:
            return Refusal("overlong")
        output = _demonstration_output(replaced.outputs, response)
        if not await self._verify(output, replaced.fields):
            group.unsteady = True
            _say_unsteady(replaced.fields)
            return Refusal("rejected")
        group.own_step = step
        return output

    async def _of_column(self, group: _Group, replaced: _Session) -> AgentLoopOutput | Refusal:
        # In a thread: verl's parsers of tool calls are waited for.
        response = await asyncio.to_thread(
            self._chat.demonstration,
            group.demonstration,
            replaced.fields | {"agent_name": group.agent_name},
            max_tokens=self.rollout_config.response_length,
        )
        if isinstance(response, Refusal):
            return response
        output = _demonstration_output(replaced.outputs, response)
        succeeded = await self._verify(output, replaced.fields)
        group.unsteady = await self._was_otherwise(output, replaced.fields, succeeded)
        return output if succeeded else Refusal("rejected")

    async def _verify(self, output: AgentLoopOutput, fields: dict[str, Any]) -> bool:
        """Whether the run's reward function calls it a success."""
        await self._score([output], fields)
        return output.reward_score is not None and self._succeeded(output, output.reward_score)

    async def _was_otherwise(self, output: AgentLoopOutput, fields: dict[str, Any], succeeded: bool) -> bool:
        """Whether another look at the same demonstration came out differently; such a reward cannot be relied on.

        The first demonstrations of this worker are looked at twice, every other one whenever its prompt comes again.
        """
        demonstration = hash((tuple(output.prompt_ids), tuple(output.response_ids)))
        before = self._verdicts.get(demonstration)
        if before is None and len(self._verdicts) < LOOKED_AT_TWICE:
            extra_fields = {k: v for k, v in output.extra_fields.items() if k != "reward_extra_info"}
            again = output.model_copy(update={"reward_score": None, "extra_fields": extra_fields})
            before = await self._verify(again, fields)
        self._verdicts[demonstration] = succeeded
        if before in (None, succeeded):
            return False
        _say_unsteady(fields)
        return True


def _say_unsteady(fields: dict[str, Any]) -> None:
    logger.warning(
        "hapo: the reward function does not agree with itself on a demonstration (data_source=%s, index=%s): a "
        "success in one call and none in another. Make it reproducible",
        fields.get("data_source"),
        _plain(fields["index"]),
    )


def _describe(rollouts: list[Rollout], *, outcome: str, **gate: Any) -> dict[str, Any]:
    """What the gate saw and did.

    `outcome` is not_gated (nothing to judge), not_fired, not_admitted (fired, but the budget went elsewhere), injected
    or the reason of a refusal; `firing` is the probability of firing at each success count; `own_step` is that in which
    the policy itself has written what was injected.
    """
    return {
        "outcome": outcome,
        "scores": [rollout.score for rollout in rollouts],
        "successes": [rollout.success for rollout in rollouts],
        **dict.fromkeys(("fired", "firing", "threshold", "confidence", "key", "replaced", "unsteady", "own_step")),
        **gate,
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _demonstration_output(replaced: list[AgentLoopOutput], response: Response) -> AgentLoopOutput:
    """The replaced rollout's output with the demonstration's response.

    Copied from the loser, so that it has every field the other rows have: a field that one row of a batch lacks
    disappears for all rows. Its rollout log-probs are NaN until the trainer knows better (`_compute_old_log_prob`);
    zeros would read as probability 1. What its tools would have been rewarded with is not known, so it is what verl
    notes of a tool that gives no reward.
    """
    first, final = replaced[0], replaced[-1]
    of_tools = {"turn_scores": [], "tool_rewards": [0.0] * response.answers}
    extra_fields = {key: of_tools.get(key, value) for key, value in final.extra_fields.items()}
    extra_fields.pop("reward_extra_info", None)
    return final.model_copy(
        update={
            "prompt_ids": list(first.prompt_ids),
            "response_ids": response.tokens,
            "response_mask": response.mask,
            "response_logprobs": None if final.response_logprobs is None else [float("nan")] * len(response.tokens),
            "multi_modal_data": first.multi_modal_data,
            "reward_score": None,
            "num_turns": response.num_turns,
            "metrics": final.metrics.model_copy(),
            "extra_fields": extra_fields,
        }
    )


class HapoAgentLoopManager(AgentLoopManagerTQ):
    """`actor_rollout_ref.rollout.agent.agent_loop_manager_class` of a HAPO run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(HapoAgentLoopWorker)
