"""What the processes of `on_ranks` need of verl, imported once by the server that they are forked from."""

import verl
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers import engine, engine_workers

from hapo_verl.actor import engine as hapo_engine
from hapo_verl.driver import trainer
from tests import parsed_yaml

parsed_yaml.install()

__all__ = ["engine", "engine_workers", "get_trainer_cls", "hapo_engine", "trainer", "verl"]
