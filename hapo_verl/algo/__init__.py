"""HAPO as pure functions of tensors and numbers: no verl and no global random state. Only `gate_state`, which holds
the state of a run, reads a configuration object.

Read in this order: `gate` (when a group gets a demonstration), `demonstration` (its tokens), `injection` (which rollout
it replaces), `advantage` and `policy_loss` (how the group is trained on).

Shape suffixes of the whole project: P prompts, N rollouts per prompt, B rows of a batch (rollouts and demonstrations),
T tokens of a response, V vocabulary, H hidden.
"""
