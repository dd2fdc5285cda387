"""The Emu3 sequence: vocabulary, grammar, allowed tokens, checkpoints."""
