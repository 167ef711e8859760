"""Where trained weights come from, and whether they fit."""
