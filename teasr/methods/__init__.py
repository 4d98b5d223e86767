"""Training methods, one file per paper, each defining its networks (roles) and losses; sampler.py holds the samplers.

Methods access models through the interface in base.py. Files here may import `backbones.model` and `backbones.roles`,
`data.batch`, `diffusion` and `util`; they know neither DeepSpeed nor MLflow nor a specific backbone.
"""
