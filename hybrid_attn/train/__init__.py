"""Training: one pure step, its optimiser, the loop around it and its metrics."""
