"""Sources of trained weights, and checks whether the weights fit."""
