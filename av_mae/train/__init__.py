"""Pretraining, and the training of heads: the compiled step, the loop and its hooks, meshes and hosts."""
