"""The embedded demo's world: scenes, edits, raw data, a starting policy and a shipped vision tokenizer."""
