"""The reward of the end-to-end test with calls: it compares the last line, and checks the counts that verl passes."""


def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    """1 if the last line is the answer and the numbers of turns and tool rewards agree with the text."""
    turns, answers = solution_str.count("\nassistant\n") + 1, solution_str.count("<tool_response>")
    counted = extra_info["num_turns"] == 2 * turns and extra_info["tool_rewards"] == [0.0] * answers
    success = float(counted and solution_str.rpartition("\n")[2] == ground_truth)
    return {"score": success, "acc": success}
