"""A run: where its files lie, how far it is, what is left to do, and whether it is sound."""
