"""Training: losses of the exits, aggregation of their gradients, timm's task, gradient conflict, a run's checkpoint."""
