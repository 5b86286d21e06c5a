"""The turn format of a tokenizer; the templates of public models are tested in `tests/rollout/test_tokens.py`."""

import sys
from pathlib import Path

import pytest

from hapo_verl.algo.chat import TurnFormat
from hapo_verl.algo.demonstration import Refusal

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.make_tokenizer("0123456789")


def test_answers_to_a_chat_and_to_a_text_end_where_generation_stops(tokenizer):
    chat = TurnFormat.of(tokenizer, generation_config=None, template_kwargs={})
    text = TurnFormat.of_text(tokenizer, end_tokens=[tokenizer.eos_token_id])
    for turn in (chat, text):
        assert tokenizer.decode(turn.single_turn("42", max_tokens=3).tokens) == "42<|im_end|>"
        assert turn.single_turn("42<|im_end|>", max_tokens=3) == turn.single_turn("42", max_tokens=3)
        assert turn.single_turn("42", max_tokens=2) == Refusal("overlong")
        assert turn.single_turn("4<|im_start|>2", max_tokens=9) == Refusal("malformed")


def test_several_turns_without_tools_are_malformed(tokenizer):
    turn = TurnFormat.of(tokenizer, generation_config=None, template_kwargs={})
    say = [
        {"role": "assistant", "content": "4"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    assert turn.single_turn(say, max_tokens=9) == Refusal("malformed")
    assert turn.single_turn(say[:1], max_tokens=9).turns == 1
