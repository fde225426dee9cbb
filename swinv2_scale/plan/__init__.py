"""What a model or a run will cost, answered from its configuration in a second: no torch, nothing is built."""
