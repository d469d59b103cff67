"""Time and memory of programs that do the same work, measured side by side."""
