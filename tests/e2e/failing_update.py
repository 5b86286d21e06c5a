"""Named in VERL_USE_EXTERNAL_MODULES: vLLM's worker fails to load the weights of the second step."""

from itertools import count

from wrapt import when_imported


@when_imported("verl.workers.rollout.vllm_rollout.utils")
def _fail(module):
    worker, updates = module.vLLMColocateWorkerExtension, count()
    original = worker._update_weights

    def update(self, weights, *args, **kwargs):
        # The first update is at the start. The error's frames keep references to weights, so verl's clean-up fails too.
        if next(updates) == 2:
            raise ValueError("these weights fail on purpose")
        return original(self, weights, *args, **kwargs)

    worker._update_weights = update
