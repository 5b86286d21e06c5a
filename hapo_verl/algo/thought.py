"""Where a chat template leaves the policy, inside a thought or behind one, and how a demonstration goes on from there.

    turn = what the template writes in front of the policy's first token ⊕ the demonstration's text

One rule for every template: in the whole turn the tags of thoughts open and close by turns, and it ends outside of one.

    the template ends with       a text that repeats it     a text that goes on     else
    <think>\\n                    the repetition is cut      closes the thought      None: the answer would be a thought
    <think>\\n\\n</think>\\n\\n      the repetition is cut      has no thought          None: the run wants no thoughts
    neither                                                 is balanced             None

White space in front of a repetition goes with it, and behind it as much as the template has written itself. A tag of
another name that the template ends with, as `<answer>`, is not repeated either; where it is closed is not looked at.
"""

from __future__ import annotations

import re
from itertools import takewhile

# Opening tag → closing tag.
THOUGHTS = {f"<{name}>": f"</{name}>" for name in ("think", "thinking", "thought", "reasoning", "seed:think")} | {
    "[THINK]": "[/THINK]"
}

_OPENED = re.compile(r"(<[A-Za-z][^<>|/]*>|\[[A-Z_]+\])(\s*)\Z")
_EMPTY = {opening: rf"{re.escape(opening)}\s*{re.escape(closing)}" for opening, closing in THOUGHTS.items()}


def continued(text: str, generation_prompt: str) -> str | None:
    """What the policy would write of a demonstration's turn; None where its thoughts do not fit the template.

    Args:
        text: the turn, thoughts included.
        generation_prompt: what the chat template writes in front of the policy's first token.
    """
    opened = _OPENED.search(generation_prompt)
    if opened is not None:
        tag, space = opened.groups()
        text = _without(re.escape(tag), space, text)
        if tag in THOUGHTS:
            return text if _is_balanced(text, tag, inside=True) else None
    for tag, empty in _EMPTY.items():
        over = re.search(rf"{empty}(\s*)\Z", generation_prompt)
        if over is not None:
            text = _without(empty, over[1], text)
            return None if _tags(text, tag) else text
    return text if _is_balanced(text, "<think>", inside=False) else None


def _without(pattern: str, space: str, text: str) -> str:
    """The text without what the template has written already, `space` behind it included."""
    repeated = re.match(rf"\s*{pattern}", text)
    if repeated is None:
        return text
    behind = text[repeated.end() :]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(space, behind, strict=False))
    return behind[sum(1 for _ in shared) :]


def _tags(text: str, opening: str) -> list[str]:
    return re.findall(f"{re.escape(opening)}|{re.escape(THOUGHTS[opening])}", text)


def _is_balanced(text: str, opening: str, *, inside: bool) -> bool:
    for tag in _tags(text, opening):
        if inside == (tag == opening):
            return False
        inside = not inside
    return not inside
