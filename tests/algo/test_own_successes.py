"""The policy's remembered successes: tokens are exact, the right success is kept, and the byte limit holds."""

import gc
import io
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_verl.algo.demonstration import Response
from hapo_verl.algo.own_successes import MIB, PER_PROMPT, OwnSuccess, OwnSuccesses, packed, unpacked


def of_one_turn(*tokens):
    return Response(list(tokens), [1] * len(tokens), 1, 0)


@st.composite
def responses(draw, largest=2**32 - 1, most=40):
    tokens = draw(st.lists(st.integers(0, largest), min_size=1, max_size=most))
    mask = draw(
        st.one_of(st.just([1] * len(tokens)), st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens)))
    )
    return Response(tokens, mask, draw(st.integers(0, 9)), draw(st.integers(0, 9)))


# The steps of a run, each with its successes as (prompt, response).
runs = st.lists(st.lists(st.tuples(st.integers(0, 5), responses(largest=300, most=12)), max_size=6), max_size=8)


def recalled(successes, key, step):
    data = successes.recall(key, step)
    return unpacked(data) if data else None


def after(run, limit=MIB, **settings):
    successes = OwnSuccesses(limit, **settings)
    for step, observed in enumerate(run, start=1):
        successes.observe(observed, step)
    return successes


@settings(max_examples=50)
@given(responses(), st.integers(-1, 2**40))
def test_packed_tokens_are_unpacked_unchanged(response, step):
    assert unpacked(packed(OwnSuccess(response, step))) == OwnSuccess(response, step)


def test_a_token_takes_as_many_bits_as_the_largest_id():
    small, large = (packed(OwnSuccess(of_one_turn(*[token] * 1000), 1)) for token in (1, 151_935))
    assert len(small) < 1000 / 8 + 32
    assert len(large) < 18 * 1000 / 8 + 32


@settings(max_examples=50)
@given(runs)
def test_the_shortest_success_of_the_latest_step_with_one_is_kept(run):
    successes = after(run)
    for key in range(6):
        steps = [step for step, observed in enumerate(run, start=1) if any(of == key for of, _ in observed)]
        found = recalled(successes, key, len(run) + 1)
        if not steps:
            assert found is None
            continue
        candidates = [response.tokens for of, response in run[steps[-1] - 1] if of == key]
        assert found.step == steps[-1]
        assert found.response.tokens == min(candidates, key=lambda tokens: (len(tokens), tokens))


@settings(max_examples=50)
@given(runs, st.integers(0, 2000), st.randoms(use_true_random=False))
def test_the_order_in_which_a_steps_successes_come_does_not_matter(run, limit, rng):
    shuffled = [rng.sample(observed, len(observed)) for observed in run]
    ours, theirs = after(run, limit), after(shuffled, limit)
    assert [recalled(ours, key, 9) and recalled(ours, key, 9).response.tokens for key in range(6)] == [
        recalled(theirs, key, 9) and recalled(theirs, key, 9).response.tokens for key in range(6)
    ]
    assert list(ours._packed) == list(theirs._packed)


@settings(max_examples=50)
@given(runs, st.integers(0, 2000))
def test_the_bound_holds_after_every_step_and_the_newest_successes_are_kept(run, limit):
    successes = OwnSuccesses(limit)
    unlimited = OwnSuccesses(2**40)
    for step, observed in enumerate(run, start=1):
        for each in (successes, unlimited):
            each.observe(observed, step)
        assert successes.nbytes == sum(len(data) + PER_PROMPT for data in successes._packed.values()) <= limit
        steps = [unpacked(data).step for data in successes._packed.values()]
        assert steps == sorted(steps)
    if all(len(packed(OwnSuccess(response, 1))) + PER_PROMPT <= limit for observed in run for _, response in observed):
        # No success was larger than the limit, so the kept ones are the newest of those without a limit.
        kept, every = list(successes._packed), list(unlimited._packed)
        assert kept == every[len(every) - len(kept) :]


def test_the_oldest_success_is_evicted_and_counted():
    one = len(packed(OwnSuccess(of_one_turn(7, 7), 1))) + PER_PROMPT
    successes = OwnSuccesses(2 * one)
    for step, key in ((1, 10), (2, 11), (3, 10), (4, 12)):
        successes.observe([(key, of_one_turn(7, 7))], step)
    # Prompt 10 was solved again in step 3, so prompt 11 is the oldest.
    assert [bool(successes.recall(key, 5)) for key in (10, 11, 12)] == [True, False, True]
    assert (len(successes), successes.evicted, successes.nbytes) == (2, 1, 2 * one)


def test_a_success_larger_than_the_limit_evicts_no_other():
    successes = OwnSuccesses(PER_PROMPT + 30)
    successes.observe([(1, of_one_turn(7))], 1)
    successes.observe([(2, of_one_turn(*range(1000)))], 2)
    assert successes.recall(1, 3)
    assert not successes.recall(2, 3)
    assert successes.evicted == 0


@settings(max_examples=50)
@given(runs, st.integers(1, 4))
def test_successes_are_recalled_up_to_the_age_limit_and_not_beyond(run, age):
    limited, unlimited = after(run, max_age=age), after(run)
    for step in range(len(run) + 1, len(run) + 7):
        for key in range(6):
            found = recalled(unlimited, key, step)
            expected = found if found and step - found.step <= age else None
            assert recalled(limited, key, step) == expected
    limited.observe([], len(run) + age)
    assert len(limited) == limited.nbytes == 0


@settings(max_examples=50)
@given(runs, runs, st.integers(0, 4000), st.one_of(st.none(), st.integers(1, 4)))
def test_a_memory_continues_the_same_after_saving_and_loading(run, rest, limit, age):
    kept = after(run, limit, max_age=age)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **kept.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        loaded = OwnSuccesses(limit, max_age=age)
        loaded.restore(arrays)
    for step, observed in enumerate([[], *rest], start=len(run) + 1):
        assert list(loaded._packed.items()) == list(kept._packed.items())
        assert (loaded.nbytes, loaded.evicted) == (kept.nbytes, kept.evicted)
        for each in (kept, loaded):
            each.observe(observed, step)


def test_a_memory_loaded_with_a_lower_limit_forgets_the_oldest():
    kept = after([[(1, of_one_turn(7))], [(2, of_one_turn(7))]])
    smaller = OwnSuccesses(kept.nbytes - 1)
    smaller.restore(kept.arrays())
    assert [bool(smaller.recall(key, 3)) for key in (1, 2)] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"keys": np.array([1], dtype=np.uint64)},
        {"keys": np.array([1, 1], dtype=np.uint64)},
        {"sizes": np.array([10, 32])},
        {"sizes": np.array([20, 23])},
        {"packed": np.zeros(42, dtype=np.uint8)},
    ],
)
def test_arrays_that_hold_no_successes_are_refused(change):
    arrays = after([[(1, of_one_turn(7)), (2, of_one_turn(8))]]).arrays()
    with pytest.raises(ValueError, match="success"):
        OwnSuccesses(MIB).restore(arrays | change)


def test_a_hundred_thousand_prompts_of_a_thousand_tokens_fit_into_256_mib():
    """The bytes are counted for a hundredth of the prompts; Python uses no more than the counted bytes."""
    rng, keys = np.random.default_rng(0), random.Random(0)
    drawn = [of_one_turn(*rng.integers(0, 151_936, 1000).tolist()) for _ in range(20)]
    gc.collect()
    tracemalloc.start()
    try:
        successes = OwnSuccesses(256 * MIB / 100)
        successes.observe(((keys.getrandbits(64), drawn[i % 20]) for i in range(1000)), 1)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert (len(successes), successes.evicted) == (1000, 0)
    assert taken <= successes.nbytes <= 256 * MIB / 100


@pytest.mark.parametrize("count", [100, 700, 1400, 11_000])
def test_python_takes_no_more_than_what_is_counted_for_short_successes_too(count):
    keys = random.Random(0)
    gc.collect()
    tracemalloc.start()
    try:
        successes = OwnSuccesses(MIB * 100)
        empty = tracemalloc.get_traced_memory()[0]
        successes.observe(((keys.getrandbits(64), of_one_turn(5)) for _ in range(count)), 1)
        taken = tracemalloc.get_traced_memory()[0] - empty
    finally:
        tracemalloc.stop()
    assert taken <= successes.nbytes
