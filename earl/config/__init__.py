"""Experiments: the fields and their meaning, Jsonnet files resolved into them, and what a run keeps of them."""
