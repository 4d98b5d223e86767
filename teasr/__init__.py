"""TEASR: any-step real-world super-resolution by self-adversarial distillation in one diffusion transformer."""

__version__ = "0.1.0"
