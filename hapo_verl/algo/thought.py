"""Fits a demonstration's text to a chat template that may already have opened, or closed, a thought.

    turn = what the template writes before the policy's first token ⊕ the demonstration's text

The rule for every template: in the whole turn opening and closing tags of thoughts alternate, and the turn does not end
inside a thought. A text that repeats the end of the template has the repetition removed. What remains is accepted if:

    the template ends with       the text is accepted if it      otherwise
    <think>\\n                    closes the thought              None: the whole answer would be a thought
    <think>\\n\\n</think>\\n\\n      has no thought                  None: the run wants no thoughts
    neither                      is balanced                     None

White space before a repetition is removed with it; after it, as much as the template has written itself. If the
template ends with another tag, such as `<answer>`, a repetition of that is removed too, but its closing tag is not
checked.
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
    """The part of a demonstration's turn that the policy would write; None if its thoughts do not fit the template.

    Args:
        text: the turn, thoughts included.
        generation_prompt: what the chat template writes before the policy's first token.
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
    """Remove from the start of the text what the template has written already: `pattern`, then up to all of `space`."""
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
