"""From logits to operating points and presets."""
