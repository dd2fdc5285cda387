"""The stages: each a plain function from files and a configuration to files."""
