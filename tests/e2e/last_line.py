"""The reward of the end-to-end test with calls: the last line is the answer, and verl counted what stands there."""


def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    """1 for the answer, if turns and tools' rewards are those of the text."""
    turns, answers = solution_str.count("\nassistant\n") + 1, solution_str.count("<tool_response>")
    counted = extra_info["num_turns"] == 2 * turns and extra_info["tool_rewards"] == [0.0] * answers
    success = float(counted and solution_str.rpartition("\n")[2] == ground_truth)
    return {"score": success, "acc": success}
