"""What a training step needs, found by compiling it ahead of time: memory, collectives, FLOPs."""
