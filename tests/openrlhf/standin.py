"""Replaces OpenRLHF's `openrlhf.utils.agent` if it is not installed: the parts of its executor that ours uses.

`test_contract.py` compares it with OpenRLHF's own where that is installed; then all tests run on OpenRLHF's own.
"""

import asyncio
import copy
import importlib.util


class AgentExecutorBase:
    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        raise NotImplementedError


class SingleTurnAgentExecutor(AgentExecutorBase):
    def __init__(self, remote_rm_url=None):
        spec = importlib.util.spec_from_file_location("reward_func", remote_rm_url)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.reward_func = module.reward_func

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        params = copy.deepcopy(sampling_params)
        params.max_tokens = params.max_tokens or max(1, max_length - len(ids))
        ids = ids[-(max_length - params.max_tokens) :]
        written = (await llm_engine.generate(ids, params, multi_modal_data=None)).outputs[0]
        tokens = ids + written.token_ids
        row = {
            "prompt": prompt,
            "label": label,
            "images": images,
            "mm_train_inputs": None,
            "observation_tokens": tokens,
            "action_ranges": [(len(ids), len(tokens))],
            "rollout_log_probs": None,
            "truncated": written.finish_reason == "length",
            "reward": None,
            "scores": None,
            "extra_logs": {},
        }
        try:
            said = await asyncio.to_thread(self.reward_func, [hf_tokenizer.decode(tokens)], [prompt], [label])
        except Exception:
            return row
        scores = said["rewards"] if said.get("scores") is None else said["scores"]
        return row | {"reward": said["rewards"], "scores": scores, "extra_logs": said.get("extra_logs") or {}}
