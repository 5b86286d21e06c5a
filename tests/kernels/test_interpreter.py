"""A pair of NumPy and Triton that cannot interpret is refused in one line; a launch patches Triton's language once."""

import importlib

import pytest
import torch

from hapo_kernels.linear_logprob import linear_logprob
from interpreter import unusable


@pytest.mark.parametrize(
    ("numpy", "triton"), [("2.3.5", "3.6.0"), ("2.4.6", "3.7.1"), ("2.5.5", "3.9.0"), ("1.26.4", "3.6.0")]
)
def test_a_working_pair_of_versions_is_not_refused(numpy, triton):
    assert unusable(numpy, triton) == ""


@pytest.mark.parametrize("numpy", ["2.4.0", "2.5.5", "3.0.0rc1"])
def test_a_failing_pair_of_versions_is_refused_in_one_line(numpy):
    line = unusable(numpy, "3.6.0")
    assert line.startswith(f"NumPy {numpy} with Triton 3.6.0: ")
    assert line.endswith("Install numpy<2.4 or triton>=3.7.")
    assert "\n" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_a_launch_patches_the_language_once_however_many_device_functions_it_calls(monkeypatch):
    interpreter = importlib.import_module("triton.runtime.interpreter")
    counts = {"_patch_builtin": 0, "_patch_lang": 0}

    def count(name):
        original = getattr(interpreter, name)

        def counted(*arguments):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(interpreter, name, counted)

    for name in counts:
        count(name)
    few, many = [], []
    # At a function's first call the interpreter adds modules to those that the function sees.
    for rows, found in ((1, []), (1, few), (7, many)):
        counts.update(dict.fromkeys(counts, 0))
        linear_logprob(torch.randn(rows, 4), torch.randn(9, 4), torch.zeros(rows, dtype=torch.int64), impl="triton")
        found += counts.values()
    assert many[0] == few[0] > 0
    assert many[1] > few[1]
