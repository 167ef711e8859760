"""Exits for any timm backbone."""
