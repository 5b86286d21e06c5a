"""verl on one side, `hapo_verl.algo` on the other: unpack, call, repack. No mathematics, and the only importers of verl."""
