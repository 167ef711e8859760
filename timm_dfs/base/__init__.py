"""The base of networks with exits: model, partition, heads, objective, evaluation."""
