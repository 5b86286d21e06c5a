"""What crosses between the processes of a run: row fields, jagged tensors, traces, errors, stacks."""
