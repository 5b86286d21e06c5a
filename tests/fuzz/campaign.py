"""Settings of the fuzz campaigns: the same few hundred examples in `make test`, 10,000 new ones in `make test-long`.

A fault that a campaign finds becomes an ordinary test beside the tests of the faulty code.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("HAPO_FUZZ_EXAMPLES", "300"))

campaign = settings(
    max_examples=EXAMPLES,
    derandomize="HAPO_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    # The fixtures here are files that every example writes again.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Text with any Unicode character, including halves of surrogate pairs.
texts = st.text(st.characters(codec=None), max_size=30)

# Values that JSON, a parquet file or YAML may contain anywhere.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 0, -1]),
    st.floats(allow_nan=True, allow_infinity=True),
    texts,
    st.sampled_from(["", " ", "\n", "0", "1.0", "nan", "true", "null"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


def is_one_line(error: BaseException) -> bool:
    """Whether the error's text is one non-empty line."""
    return len(str(error).splitlines()) == 1 and len(str(error)) > 10
