"""The tool of the end-to-end test with calls; `multi_turn.function_tool_path` names this file."""

from verl.tools.function_tool import function_tool


@function_tool
def reverse(digits: str) -> str:
    """Reverse a string.

    Args:
        digits: what to reverse
    """
    return digits[::-1]
