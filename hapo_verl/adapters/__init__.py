"""Between verl and `hapo_verl.algo`: unpack, call, repack. No mathematics, and the only importers of verl."""
