"""A pair of NumPy and Triton that cannot interpret is refused in one line."""

import pytest

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
