"""What a run will take, known before it starts: memory, disk, tokens, hours."""
