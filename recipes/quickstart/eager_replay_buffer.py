"""verl's replay buffer, polled every 50 ms instead of every 2 s.

It is for `PRESET=grpo`, which runs verl's own trainer, because a step of the quickstart takes about as long as verl's
poll interval. HAPO's trainers have `hapo.poll_interval` for the same purpose.
"""

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class EagerReplayBuffer(ReplayBuffer):
    """The replay buffer that `trainer.v1.sampler.custom_sampler` names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, poll_interval=0.05)
