"""HAPO as pure functions of tensors and numbers: no verl, no configuration object, no global random state.

Read in this order: `gate` (when to help), `demonstration` (with what), `injection` (whom it replaces), `advantage`
and `policy_loss` (what is learned from it).

Shape suffixes of the whole project: P prompts, N rollouts a prompt, B rollouts of a batch, T tokens of a response,
V vocabulary, H hidden.
"""
