"""What --train.agent_func_path names: HAPO's executor, set up by `hapo.yaml` beside this file."""

from pathlib import Path

from hapo_verl.openrlhf.executor import HapoAgentExecutor


class AgentExecutor(HapoAgentExecutor):
    """The name that OpenRLHF looks for."""

    config = Path(__file__).with_name("hapo.yaml")
