"""Training: exit losses, gradient aggregation, timm's training tasks, gradient conflict, checkpoints of a run."""
