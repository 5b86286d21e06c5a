"""How a demonstration continues a thought that the chat template has opened."""

import pytest

from hapo_verl.algo.thought import THOUGHTS, continued

OPEN, OVER, PLAIN = "assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n", "assistant\n"


@pytest.mark.parametrize(
    ("prompt", "text", "written"),
    [
        # The template has opened the thought: the tag is there once, even if the demonstration repeats it.
        (OPEN, "<think>\na</think>b", "a</think>b"),
        (OPEN, "<think>a</think>b", "a</think>b"),
        (OPEN, "\n<think>\na</think>b", "a</think>b"),
        (OPEN, " \n <think>a</think>b", "a</think>b"),
        (OPEN, "<think>\n\na</think>b", "\na</think>b"),
        (OPEN, "a</think>b", "a</think>b"),
        (OPEN, "\na</think>b", "\na</think>b"),
        (OPEN, "a</think>b<think>c</think>d", "a</think>b<think>c</think>d"),
        ("assistant<think>", "<think>\na</think>b", "\na</think>b"),
        ("[THINK]", "[THINK]a[/THINK]b", "a[/THINK]b"),
        ("<seed:think>", "<seed:think>a</seed:think>b", "a</seed:think>b"),
        # The thought is never closed, or tags are in the wrong order.
        (OPEN, "b", None),
        (OPEN, "<think>b", None),
        (OPEN, "<think><think>a</think>b", None),
        (OPEN, "a</think>b</think>", None),
        (OPEN, "a</think>b<think>c", None),
        (OPEN, "", None),
        # The template has already closed the thought: no second one is allowed.
        (OVER, "b", "b"),
        (OVER, "\nb", "\nb"),
        (OVER, "<think>\n\n</think>\n\nb", "b"),
        (OVER, "\n<think></think>b", "b"),
        (OVER, "<think>\n\n</think>\n\n\nb", "\nb"),
        (OVER, "<think>\na</think>\nb", None),
        (OVER, "a</think>b", None),
        (OVER, "b<think>", None),
        # The template opens no thought: the tags are balanced, or there are none.
        (PLAIN, "b", "b"),
        (PLAIN, "<think>\na</think>b", "<think>\na</think>b"),
        (PLAIN, "\n<think>a</think>b", "\n<think>a</think>b"),
        (PLAIN, "a</think>b", None),
        (PLAIN, "<think>b", None),
        (PLAIN, "<think><think>a</think></think>b", None),
        # Tags with other names are text, and a repeated one is not doubled.
        ("x\n<answer>\n", "<answer>\nb</answer>", "b</answer>"),
        ("<start_of_turn>model\n", "<start_of_turn>", "<start_of_turn>"),
        ("<|assistant|>", "<|assistant|>", "<|assistant|>"),
        (PLAIN, "[THINK]b", "[THINK]b"),
        (PLAIN, "a < think> b", "a < think> b"),
    ],
)
def test_a_turn_has_every_tag_once_and_ends_outside_a_thought(prompt, text, written):
    assert continued(text, prompt) == written


@pytest.mark.parametrize("tag", THOUGHTS)
@pytest.mark.parametrize("space", ["", "\n", "\n\n"])
def test_repeating_the_templates_tag_changes_nothing(tag, space):
    text = f"a{THOUGHTS[tag]}\n\nb"
    assert continued(tag + space + text, tag + space) == continued(text, tag + space) == text
    empty = f"{tag}{space}{THOUGHTS[tag]}{space}"
    assert continued(empty + "b", empty) == continued("b", empty) == "b"
