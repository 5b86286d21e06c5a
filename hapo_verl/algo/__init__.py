"""HAPO as pure functions of tensors and numbers: no verl, no global random state, and but for `gate_state`, which
remembers a run, no configuration object.

Read in this order: `gate` (when to help), `demonstration` (with what), `injection` (whom it replaces), `advantage`
and `policy_loss` (what is learned from it).

Shape suffixes of the whole project: P prompts, N rollouts a prompt, B rollouts of a batch, T tokens of a response,
V vocabulary, H hidden.
"""
