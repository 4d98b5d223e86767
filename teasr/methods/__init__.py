"""The papers: each method is one file that says which networks it trains (roles) and what their losses are; sampler.py restores with them.

A method sees models through the contract of base.py. It may import `backbones.model` and `backbones.roles`, `data.batch`, `diffusion` and `util`,
and knows neither DeepSpeed nor MLflow nor a particular backbone.
"""
