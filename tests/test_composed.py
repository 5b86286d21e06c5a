"""The faster composition of the tests gives the configuration, and the errors, of Hydra's."""

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from hapo_verl.launch.rehearsal import composed
from tests.composed import launch


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("+hapo=paper", "actor_rollout_ref.rollout.n=8", "hapo.trace_dir=null"),
        # Of two values of a key the last one counts; a preset is composed before the keys, wherever it stands.
        ("hapo.seed=3", "+hapo=plus", "hapo.gate.name=paper", "hapo.seed=4", "+hapo.gate.threshold=0.5"),
        ("+hapo=plus", "++trainer.own=[1,{a: 2}]", "~algorithm.kl_ctrl", "data.train_files=[a,b]"),
        ("+hapo=plus", "+hapo_platform=cpu", "trainer.total_training_steps=${actor_rollout_ref.rollout.n}"),
        ("model_engine=veomni",),
    ],
)
def test_it_equals_hydras(overrides):
    ours, hydras = launch(*overrides), composed(overrides)
    assert OmegaConf.to_container(ours, resolve=False) == OmegaConf.to_container(hydras, resolve=False)
    assert OmegaConf.is_struct(ours) == OmegaConf.is_struct(hydras)
    ours.trainer.project_name = "another"
    assert launch(*overrides).trainer.project_name == hydras.trainer.project_name


@pytest.mark.parametrize("wrong", ["algorithm.adv_estimatr=hapo", "trainer.nowhere.at_all=1", "+trainer.device=cpu"])
def test_its_errors_are_hydras(wrong):
    texts = []
    for compose in (composed, lambda overrides: launch(*overrides)):
        with pytest.raises(ConfigCompositionException) as raised:
            compose(["+hapo=paper", wrong])
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
