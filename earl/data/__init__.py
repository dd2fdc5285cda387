"""Tokenised examples: reading them, and mixing data sets into the prompts of an iteration."""
