"""Agent loops for the end-to-end tests; `agent_loops.yaml` names them for verl."""

from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class FailingLoop(SingleTurnAgentLoop):
    """verl's single-turn loop in which a training session fails if the policy begins with the digit 3."""

    async def run(self, sampling_params, **kwargs):
        output = await super().run(sampling_params, **kwargs)
        # In greedy validation every answer may begin the same, and verl cannot validate if all sessions fail.
        is_training = sampling_params["temperature"] > 0
        if is_training and output.response_ids[:1] == self.tokenizer.encode("3", add_special_tokens=False):
            raise RuntimeError("this session fails on purpose")
        return output


class ScriptedLoop(AgentLoopBase):
    """Answers that depend only on the prompt and the session, and are right in some sessions of every run."""

    async def run(self, sampling_params, **kwargs):
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        answer = kwargs["reward_model"]["ground_truth"]
        text = scripted_answer(answer, kwargs["session_id"])
        response_ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        score = float(text == answer)
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=[-2.0] * len(response_ids),
            reward_score=score,
            num_turns=2,
            metrics={},
            extra_fields={"reward_extra_info": {"acc": score}, "min_global_steps": 0, "max_global_steps": 0},
        )


def scripted_answer(answer: str, session: int) -> str:
    """What `ScriptedLoop` says in a session: three digits, right in every third one, never for a multiple of 4."""
    number = int(answer)
    wrong = f"{(number * 7 + session * 13 + 1) % 1000:03d}"
    return answer if (number + session) % 3 == 0 and number % 4 else wrong
