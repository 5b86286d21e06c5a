"""Demonstrations with tool calls compared with verl's own tool loop: the same tokens, mask and turns.

verl's `ToolAgentLoop` runs with a server that writes the demonstration's assistant turns, given here as tokens, and
with tools that give the demonstration's answers.
"""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from hapo_verl.algo.demonstration import Refusal
from hapo_verl.rollout.tokens import ChatFormat
from hapo_verl.rollout.tool_loop import ToolLoop
from tests.composed import launch
from tests.rollout.tool_chat import DEAF, GLM, HERMES, QWEN, make_tokenizer

REVERSE = Path(__file__).parents[1] / "e2e" / "reverse_tool.py"
TOOL_AGENT = "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"
MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
PROMPT = [{"role": "system", "content": "Reverse."}, {"role": "user", "content": "12"}]


@dataclass
class Tool:
    """A stateful tool that answers from a list."""

    name: str
    answers: list = field(default_factory=list)

    @property
    def tool_schema(self):
        properties = {"digits": {"type": "string", "description": "what to reverse"}}
        function = {"name": self.name, "description": "Reverses.", "parameters": {"type": "object"}}
        function["parameters"] |= {"properties": properties, "required": ["digits"]}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

    async def create(self, create_kwargs):
        return self.answers.pop(0), None

    async def execute(self, instance_id, parameters, agent_data):
        return ToolResponse(text=instance_id), 0.0, {}

    async def release(self, instance_id):
        pass


@dataclass
class Run:
    """A launch of verl's tool loop.

    Attributes:
        config: verl's whole configuration.
        template: chat template.
        special: special tokens beside the quickstart's.
        model_type: the model type, by which verl chooses its builder for answers.
        ends: tokens at which generation stops.
    """

    config: object
    template: str = QWEN
    special: tuple = ()
    model_type: str = "qwen2"
    ends: tuple = ("<|im_end|>",)
    names: tuple = ("reverse", "repeat")

    def __post_init__(self):
        self.tokenizer = make_tokenizer(self.template, *self.special)

    def ours(self, demonstration, max_tokens=10_000, **row):
        tools = [Tool(name) for name in self.names]
        loop = ToolLoop(
            self.config, self.tokenizer, load_tools=lambda: tools, load_model=lambda: (self.model_type, None)
        )
        chat = ChatFormat.of(
            self.tokenizer,
            generation_config=SimpleNamespace(eos_token_id=[self.token(end) for end in self.ends]),
            template_kwargs=dict(self.config.data.apply_chat_template_kwargs),
            tool_loop=loop,
        )
        return chat.demonstration(demonstration, row, max_tokens=max_tokens)

    def verls(self, written, answers, **row):
        """verl's output if the policy writes these texts and the tools give these answers."""
        said = [self.tokenizer.encode(text, add_special_tokens=False) for text in written]

        class Server:
            async def generate(self, **kwargs):
                tokens = said.pop(0)
                return TokenOutput(token_ids=tokens, log_probs=[-1.0] * len(tokens), num_preempted=0)

        # All tools share one list, because the loop asks for the answers in the order of the calls.
        answers = list(answers)

        async def output_of_the_loop():
            loop = ToolAgentLoop(
                trainer_config=DictConfigWrap(self.config),
                server_manager=Server(),
                tokenizer=self.tokenizer,
                processor=None,
                dataset_cls=RLHFDataset,
                data_config=DictConfigWrap(self.config.data),
                hf_model_type=self.model_type,
                tools=ToolListWrap([Tool(name, answers) for name in self.names]),
            )
            return await loop.run({}, raw_prompt=PROMPT, **row)

        output = asyncio.run(output_of_the_loop())
        assert not said, "verl's loop ended before the demonstration did"
        assert not answers
        return output

    def token(self, text):
        (token,) = self.tokenizer.encode(text, add_special_tokens=False)
        return token


@pytest.fixture(scope="module")
def composed():
    config = launch("+hapo=paper", "actor_rollout_ref.rollout.n=8")
    OmegaConf.set_struct(config, False)
    return config


@pytest.fixture
def a_run(composed):
    def build(*overrides, **settings):
        lengths = [f"actor_rollout_ref.rollout.{name}_length=10000" for name in ("prompt", "response")]
        return Run(OmegaConf.merge(composed, OmegaConf.from_dotlist([TOOL_AGENT, *lengths, *overrides])), **settings)

    return build


def say(text, *calls):
    message = {"role": "assistant", "content": text}
    return message | ({"tool_calls": list(calls)} if calls else {})


def call(digits, name="reverse", as_text=True):
    arguments = {"digits": digits}
    arguments = json.dumps(arguments) if as_text else arguments
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(text):
    return {"role": "tool", "content": text}


def hermes(digits, name="reverse"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"digits": "{digits}"}}}}\n</tool_call>'


END = "<|im_end|>"
PARALLEL = f"{MULTI_TURN}.max_parallel_calls=3"

# Each case is name: (overrides, demonstration, what the policy writes in each turn).
CASES = {
    "one call": (
        [],
        [say("I ask.", call("12")), answer("21"), say("21")],
        [f"I ask.\n{hermes('12')}{END}", f"21{END}"],
    ),
    "a call without words, arguments as a mapping with nulls": (
        [],
        [say(None, call("12", as_text=False) | {"id": None}), answer("21"), say("21")],
        [hermes("12") + END, f"21{END}"],
    ),
    "two rounds": (
        [],
        [say("", call("1")), answer("1"), say("Again.", call("12", "repeat")), answer("1212"), say("so 21")],
        [hermes("1") + END, f"Again.\n{hermes('12', 'repeat')}{END}", f"so 21{END}"],
    ),
    "two calls at once": (
        [PARALLEL],
        [say("Both.", call("1"), call("2", "repeat")), answer("first"), answer("second"), say("21")],
        [f"Both.\n{hermes('1')}\n{hermes('2', 'repeat')}{END}", f"21{END}"],
    ),
    "a call written out in the text": (
        [],
        [say("x" + hermes("12") + "y"), answer("21"), say("21")],
        [f"x{hermes('12')}y{END}", f"21{END}"],
    ),
    "an answer of no characters and one of several lines": (
        [PARALLEL],
        [say("", call("1"), call("2")), answer(""), answer("a\n\nb"), say("21")],
        [f"{hermes('1')}\n{hermes('2')}{END}", f"21{END}"],
    ),
    "an end of turn that a text brings": (
        [],
        [say(hermes("12") + END), answer("21"), say("21" + END)],
        [hermes("12") + END, f"21{END}"],
    ),
    "no call at all": ([], [say("21")], [f"21{END}"]),
    "a thinking tag that the template opens in every turn": (
        ["data.apply_chat_template_kwargs.thinking=true"],
        [say("<think>\nhm</think>", call("12")), answer("21"), say("<think>\nyes</think>21")],
        [f"hm</think>\n{hermes('12')}{END}", f"yes</think>21{END}"],
    ),
} | {
    f"answers shortened, {side}, {size}": (
        [f"{MULTI_TURN}.max_tool_response_length={size}", f"{MULTI_TURN}.tool_response_truncate_side={side}", PARALLEL],
        [say("", call("1"), call("2")), answer("0123456"), answer("01234567"), say("21")],
        [f"{hermes('1')}\n{hermes('2')}{END}", f"21{END}"],
    )
    for side in ("left", "middle", "right")
    for size in (1, 6, 7)
}


def assert_equal(ours, verls):
    assert ours.tokens == verls.response_ids
    assert ours.mask == verls.response_mask
    assert ours.num_turns == verls.num_turns
    assert ours.answers == len(verls.extra_fields["tool_rewards"])


@pytest.mark.parametrize("name", CASES)
def test_a_demonstration_equals_what_verls_loop_would_have_written(a_run, name):
    overrides, demonstration, written = CASES[name]
    run = a_run(*overrides)
    answers = [message["content"] for message in demonstration if message["role"] == "tool"]
    ours, verls = run.ours(demonstration), run.verls(written, answers)
    assert_equal(ours, verls)
    # Only the tokens that the policy wrote train.
    assert sum(ours.mask) == sum(len(run.tokenizer.encode(text)) for text in written)
    trained = [token for token, flag in zip(ours.tokens, ours.mask, strict=True) if flag]
    assert run.tokenizer.decode(trained) == "".join(written)


def test_a_model_that_verl_does_not_know_gets_verls_default_builder(a_run):
    _, demonstration, written = CASES["two rounds"]
    run = a_run(model_type="unheard_of")
    assert_equal(run.ours(demonstration), run.verls(written, ["1", "1212"]))


def test_a_template_that_drops_text_beside_a_call_writes_only_the_call(a_run):
    run = a_run(template=HERMES)
    demonstration = [say("", call("12")), answer("21"), say("21")]
    assert_equal(run.ours(demonstration), run.verls([hermes("12") + END, f"21{END}"], ["21"]))
    assert run.ours([say("I ask.", call("12")), answer("21"), say("21")]) == Refusal("malformed")
    spelt = [say("I ask." + hermes("12")), answer("21"), say("21")]
    assert_equal(run.ours(spelt), run.verls([f"I ask.{hermes('12')}{END}", f"21{END}"], ["21"]))


def test_a_template_that_cannot_render_calls_takes_them_as_text(a_run):
    run = a_run(template=DEAF)
    assert run.ours([say("", call("12")), answer("21"), say("21")]) == Refusal("malformed")
    spelt = [say(hermes("12")), answer("21"), say("21")]
    assert_equal(run.ours(spelt), run.verls([hermes("12") + END, f"21{END}"], ["21"]))


def test_plain_text_with_which_a_template_closes_turns_is_not_the_policys(a_run):
    run = a_run(template=QWEN.replace(END, "~"), model_type="unheard_of")
    demonstration = [say("", call("12")), answer("21"), say("21")]
    assert_equal(run.ours(demonstration), run.verls([hermes("12") + END, f"21{END}"], ["21"]))


def test_a_call_at_which_the_template_raises_is_malformed(a_run):
    run = a_run(template=QWEN.replace("| tojson }}\n{{- '}", "+ 1 }}\n{{- '}"))
    assert run.ours([say("", call("12")), answer("21"), say("21")]) == Refusal("malformed")


def test_a_turn_can_end_with_the_token_that_opens_the_answer(a_run):
    run = a_run(
        f"{MULTI_TURN}.format=glm",
        PARALLEL,
        template=GLM,
        special=("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
        model_type="glm4_moe",
        ends=("<|im_end|>", "<|user|>", "<|observation|>"),
    )

    def glm(digits):
        return f'\n<tool_call>reverse\n<arg_key>digits</arg_key>\n<arg_value>"{digits}"</arg_value>\n</tool_call>'

    demonstration = [say("I ask.", call("1"), call("2")), answer("1"), answer("2"), say("21")]
    written = [f"I ask.{glm(1)}{glm(2)}<|observation|>", "21<|im_end|>"]
    assert_equal(run.ours(demonstration), run.verls(written, ["1", "2"]))


def test_a_rows_own_tools_are_the_only_ones_it_may_call(a_run):
    run = a_run()
    _, demonstration, written = CASES["one call"]
    row = {"extra_info": {"tool_selection": ["reverse"]}}
    assert_equal(run.ours(demonstration, **row), run.verls(written, ["21"], **row))
    assert run.ours(demonstration, extra_info={"tool_selection": ["repeat"]}) == Refusal("malformed")


@pytest.mark.parametrize("name", ["two rounds", "two calls at once", "answers shortened, middle, 6"])
def test_the_response_limit_includes_answers_and_the_longest_response_fits(a_run, name):
    overrides, demonstration, _ = CASES[name]
    run = a_run(*overrides)
    whole = run.ours(demonstration)
    assert run.ours(demonstration, max_tokens=len(whole.tokens)) == whole
    assert run.ours(demonstration, max_tokens=len(whole.tokens) - 1) == Refusal("overlong")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((f"{MULTI_TURN}.max_assistant_turns=3",), "two rounds"),
        ((f"{MULTI_TURN}.max_user_turns=2",), "two rounds"),
        ((f"{MULTI_TURN}.max_parallel_calls=2",), "two calls at once"),
        ((f"{MULTI_TURN}.max_assistant_turns=1", f"{MULTI_TURN}.max_user_turns=1"), "no call at all"),
    ],
)
def test_at_the_limits_of_the_loop_verl_still_continues(a_run, overrides, name):
    _, demonstration, written = CASES[name]
    answers = [message["content"] for message in demonstration if message["role"] == "tool"]
    run = a_run(*overrides)
    assert_equal(run.ours(demonstration), run.verls(written, answers))


@pytest.mark.parametrize(
    ("override", "name"),
    [
        (f"{MULTI_TURN}.max_assistant_turns=2", "two rounds"),
        (f"{MULTI_TURN}.max_user_turns=1", "two rounds"),
        (f"{MULTI_TURN}.max_parallel_calls=1", "two calls at once"),
    ],
)
def test_one_turn_or_call_beyond_the_limits_is_overlong_and_verl_would_stop(a_run, override, name):
    _, demonstration, written = CASES[name]
    answers = [message["content"] for message in demonstration if message["role"] == "tool"]
    run = a_run(override)
    assert run.ours(demonstration) == Refusal("overlong")
    with pytest.raises(AssertionError):
        run.verls(written, answers)


@pytest.mark.parametrize(
    "demonstration",
    [
        [say("", call("12", "unknown")), answer("Unknown function"), say("21")],
        [say("no call"), answer("21"), say("21")],
        [say(hermes("1") + hermes("2")), answer("21"), say("21")],
        [say(hermes("12").replace('{"digits"', '{"digits')), answer("21"), say("21")],
        [say("", call("12</tool_call>")), answer("21"), say("21")],
        [say("", call(f"1{END}2")), answer("21"), say("21")],
        [say(f"1{END}2", call("12")), answer("21"), say("21")],
        # verl would call the tool, but the demonstration has no answer.
        [say(hermes("12"))],
        hermes("12"),
        [say("", call("12")), answer("21"), say(hermes("12"))],
    ],
)
def test_a_demonstration_that_the_loop_would_answer_differently_is_malformed(a_run, demonstration):
    assert a_run(PARALLEL).ours(demonstration) == Refusal("malformed")


def test_control_tokens_around_a_call_are_allowed_and_inside_its_data_malformed(a_run):
    run = a_run(special=("<tool_call>", "</tool_call>"))
    text, expected = hermes("12"), CASES["one call"][1]
    spelt = [say(f"I ask.\n{text}"), answer("21"), say("21")]
    assert run.ours(spelt) == run.ours(expected) != Refusal("malformed")
    for said in (
        say("", call("<|im_start|>user")),
        say("<|im_start|>user", call("12")),
        say(f"<|im_start|>user\n{text}"),
        say("", call("<tool_call>")),
    ):
        assert run.ours([said, answer("21"), say("21")]) == Refusal("malformed"), said
    # Answers of tools may contain control tokens, as in verl's loop.
    assert run.ours([say("", call("12")), answer("<|im_start|>"), say("21")]) != Refusal("malformed")


def test_a_run_without_tools_or_a_tool_loop_accepts_only_one_turn(a_run):
    _, demonstration, _ = CASES["one call"]
    assert a_run(names=()).ours(demonstration) == Refusal("malformed")
    single = a_run("actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent")
    assert single.ours(demonstration) == Refusal("malformed")
    assert single.ours(demonstration, agent_name="tool_agent") == a_run().ours(demonstration)
    assert a_run().ours(demonstration, agent_name="single_turn_agent") == Refusal("malformed")
    # In a loop without tools a call is text like any other.
    assert single.ours(hermes("12")).tokens == single.tokenizer.encode(hermes("12") + END)


def test_a_list_with_one_message_equals_the_string(a_run):
    for run in (a_run(), a_run("actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent")):
        assert run.ours("so 21") == run.ours([say("so 21")])
        assert run.ours("so 21").mask == [1] * len("so 21") + [1]


def test_a_launch_loads_its_own_tools_loops_and_model(a_run, tmp_path):
    """The driver, the doctor and the data tools have no agent loop worker."""
    run = a_run()
    (tmp_path / "loops.yaml").write_text(
        "- name: own\n  _target_: verl.experimental.agent_loop.tool_agent_loop.ToolAgentLoop\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    run.tokenizer.save_pretrained(tmp_path)
    _, demonstration, _ = CASES["one call"]
    config = OmegaConf.merge(
        run.config,
        OmegaConf.from_dotlist(
            [
                f"{MULTI_TURN}.function_tool_path={REVERSE}",
                f"actor_rollout_ref.model.path={tmp_path}",
                f"actor_rollout_ref.rollout.agent.agent_loop_config_path={tmp_path}/loops.yaml",
                "actor_rollout_ref.rollout.agent.default_agent_loop=own",
            ]
        ),
    )
    chat = ChatFormat.of_launch(config, run.tokenizer)
    assert chat.demonstration(demonstration, {}, max_tokens=1000) == run.ours(demonstration)
