"""A lenient reward: the last number of the response is the answer."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    """1 if the last number is the answer."""
    numbers = re.findall(r"\d+", solution_str.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == str(ground_truth))
