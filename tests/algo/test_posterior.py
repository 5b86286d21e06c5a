"""Beta posteriors of prompts compared with counting by hand, in any order, and after saving to a file."""

import io
import random

import numpy as np
import pytest

from hapo_verl.algo.posterior import PromptPosterior, prompt_key

SETTINGS = {"discount": 0.5, "memory": 0.9}


def keys_of(*names):
    return [prompt_key(name) for name in names]


@pytest.fixture
def posterior():
    return PromptPosterior(keys_of("a", "b", "c"), ["math", "math", "code"])


def priors(posterior, *names):
    return list(zip(*posterior.priors(keys_of(*names), strength=2.0, discount=0.5), strict=True))


def test_before_any_visit_the_prior_is_uniform(posterior):
    assert priors(posterior, "a", "c") == [(1.0, 1.0), (1.0, 1.0)]


def test_a_visit_counts_for_its_prompt_and_for_its_source(posterior):
    posterior.observe(keys_of("a"), [6], [8], **SETTINGS)
    pooled = (1 + 6) / (2 + 8)
    assert priors(posterior, "b") == [pytest.approx((2 * pooled, 2 * (1 - pooled)))]
    assert priors(posterior, "a") == [pytest.approx((2 * pooled + 0.5 * 6, 2 * (1 - pooled) + 0.5 * 2))]
    assert priors(posterior, "c") == [(1.0, 1.0)]


def test_earlier_visits_fade(posterior):
    posterior.observe(keys_of("a"), [8], [8], **SETTINGS)
    posterior.observe(keys_of("a"), [0], [8], **SETTINGS)
    pooled = (1 + 0.9 * 8) / (2 + 0.9 * 8 + 8)
    assert priors(posterior, "a") == [pytest.approx((2 * pooled + 0.5 * 4, 2 * (1 - pooled) + 0.5 * 8))]


def test_the_order_of_a_steps_prompts_does_not_matter():
    rng = random.Random(0)
    names = [str(i) for i in range(50)]
    step = [(rng.choice(names), rng.randrange(9), 8) for _ in range(200)]
    states = []
    for _ in range(3):
        rng.shuffle(step)
        posterior = PromptPosterior(keys_of(*names), [str(int(name) % 3) for name in names])
        posterior.observe(
            [prompt_key(n) for n, _, _ in step], [s for _, s, _ in step], [n for *_, n in step], **SETTINGS
        )
        states.append(posterior.arrays())
    for other in states[1:]:
        assert all((states[0][name] == other[name]).all() for name in other)


def test_a_prompt_that_occurs_twice_in_a_step_is_discounted_once(posterior):
    posterior.observe(keys_of("a"), [4], [8], **SETTINGS)
    posterior.observe(keys_of("a", "a"), [1, 2], [8, 8], **SETTINGS)
    assert posterior.success_K[posterior.slots(keys_of("a"))] == 0.5 * 4 + 1 + 2


def test_rows_of_one_prompt_share_a_posterior():
    posterior = PromptPosterior(keys_of("a", "a", "b"), ["x", "x", "x"])
    assert len(posterior.key_K) == 2


def test_a_prompt_of_another_data_set_is_refused(posterior):
    with pytest.raises(KeyError):
        posterior.priors(keys_of("z"), strength=2.0, discount=0.5)


def test_everything_is_restored_from_a_file_without_code(posterior):
    posterior.observe(keys_of("a", "c"), [6, 1], [8, 8], **SETTINGS)
    file = io.BytesIO()
    np.savez(file, **posterior.arrays())
    file.seek(0)
    restored = PromptPosterior(keys_of("c", "b", "a"), ["code", "math", "math"])
    restored.restore(dict(np.load(file, allow_pickle=False)))
    assert priors(restored, "a", "b", "c") == priors(posterior, "a", "b", "c")
    posterior.observe(keys_of("b"), [2], [8], **SETTINGS)
    restored.observe(keys_of("b"), [2], [8], **SETTINGS)
    assert priors(restored, "a", "b", "c") == priors(posterior, "a", "b", "c")


@pytest.mark.parametrize(
    ("names", "sources"),
    [(("a", "b", "d"), ["math", "math", "code"]), (("a", "b", "c"), ["math", "code", "code"])],
)
def test_the_state_of_another_data_set_is_refused(posterior, names, sources):
    with pytest.raises(ValueError, match="other prompts"):
        PromptPosterior(keys_of(*names), sources).restore(posterior.arrays())


def test_prompt_keys_do_not_depend_on_the_process():
    assert prompt_key("math", "7") == 3685734614675737294
    assert prompt_key("math", "7") != prompt_key("math7", "")
