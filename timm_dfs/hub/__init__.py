"""A model's folder as it is published: weights, presets, results, card."""
