"""Named in VERL_USE_EXTERNAL_MODULES: vLLM's worker fails to load the weights of the second step."""

from itertools import count

from wrapt import when_imported


@when_imported("verl.workers.rollout.vllm_rollout.utils")
def _fail(module):
    worker, updates = module.vLLMColocateWorkerExtension, count()
    original = worker._update_weights

    def update(self, weights, *args, **kwargs):
        # The first is that of the start; the weights that the error's frames hold make verl's clean-up fail as well.
        if next(updates) == 2:
            raise ValueError("these weights fail on purpose")
        return original(self, weights, *args, **kwargs)

    worker._update_weights = update
