"""A tiny tokenizer, an engine that writes fixed texts, and OpenRLHF's executor or its replacement."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from tests.openrlhf import standin

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "quickstart"), str(RECIPES / "plain_loop")]

INSTALLED = "openrlhf" not in sys.modules and importlib.util.find_spec("openrlhf") is not None
if not INSTALLED:
    for name in ("openrlhf", "openrlhf.utils"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["openrlhf.utils.agent"] = standin

PER_GROUP = 4
REWARD = '''
import torch


def reward_func(queries, prompts, labels):
    """1 for exactly the answer; silence on an answer that begins with 8."""
    texts = [q[len(p) :].removesuffix("<|im_end|>") for q, p in zip(queries, prompts, strict=True)]
    if any(text.startswith("8") for text in texts):
        raise RuntimeError("no reward")
    reward = torch.tensor([float(text == label) for text, label in zip(texts, labels, strict=True)])
    return {"rewards": reward, "extra_logs": {"length": torch.tensor([float(len(text)) for text in texts])}}
'''


class Engine:
    """Writes these texts in turn, and starts again from the first."""

    def __init__(self, tokenizer, *texts):
        self.tokenizer, self.texts, self.calls = tokenizer, texts, 0

    async def generate(self, prompt_token_ids, sampling_params, multi_modal_data=None):
        text = self.texts[self.calls % len(self.texts)]
        self.calls += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        # The first request is the last to finish.
        for _ in range(2 * len(self.texts) - self.calls):
            await asyncio.sleep(0)
        reason = "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, text=text, logprobs=None, finish_reason=reason)])


@pytest.fixture
def tokenizer():
    import tiny_model

    return tiny_model.make_tokenizer("0123456789")


@pytest.fixture
def settings(tmp_path):
    """Writes a file of settings and returns its path."""

    def write(hapo=None, **more):
        (tmp_path / "reward.py").write_text(REWARD)
        path = tmp_path / "hapo.yaml"
        path.write_text(yaml.safe_dump({"hapo": hapo or {}, "reward": "reward.py", **more}))
        return path

    return write


@pytest.fixture
def executor(settings):
    """An executor, created like in an agent file."""

    def make(hapo=None, **more):
        from hapo_verl.openrlhf.executor import HapoAgentExecutor

        path = settings(hapo, **more)

        class AgentExecutor(HapoAgentExecutor):
            config = path

        return AgentExecutor()

    return make


@pytest.fixture
def prompted(tokenizer):
    """A question as OpenRLHF's data set writes it with --data.apply_chat_template."""

    def prompt(question):
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    return prompt


@pytest.fixture
def generate(tokenizer, prompted):
    """The rows of groups, started like OpenRLHF's vLLM actor starts a group's samples; all groups run at once."""

    def run(executor, *texts, questions=("012",), size=PER_GROUP, logprobs=None, max_tokens=6, images=None, label=None,
            **fields):  # fmt: skip
        async def group(question):
            told = {"label": question[::-1], "demonstration": question[::-1]} | fields
            params = SimpleNamespace(max_tokens=max_tokens, logprobs=logprobs)
            engine = Engine(tokenizer, *texts)
            tasks = [
                executor.execute(
                    prompt=prompted(question),
                    label=json.dumps(told) if label is None else label,
                    sampling_params=params,
                    max_length=64,
                    hf_tokenizer=tokenizer,
                    llm_engine=engine,
                    images=images,
                )
                for _ in range(size)
            ]
            return await asyncio.gather(*tasks)

        async def groups():
            return await asyncio.gather(*map(group, questions))

        return asyncio.run(groups())

    return run


@pytest.fixture
def written(tokenizer):
    """The texts of the trained tokens of rows."""

    def texts(rows):
        return [tokenizer.decode(row["observation_tokens"][slice(*row["action_ranges"][0])]) for row in rows]

    return texts
