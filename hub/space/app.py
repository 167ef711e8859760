"""The Space: timm-dfs's page on the model that comes with the package."""

import timm

import timm_dfs  # noqa: F401  registers the model
from timm_dfs import demo, space

space.launch(space.page(timm.create_model(demo.MODEL, pretrained=True).eval(), demo.MODEL))
