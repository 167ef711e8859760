"""The network with exits: its walk, partitions, heads and objective."""
