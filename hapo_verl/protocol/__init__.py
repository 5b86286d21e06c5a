"""The data that processes of a run exchange: row fields, jagged tensors, traces, errors, stacks."""
