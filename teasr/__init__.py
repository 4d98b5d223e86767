"""TEASR: any-step real-world super-resolution by self-adversarial distillation in one diffusion transformer."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`from teasr import Upscaler`, without torch for those who only want the rest."""
    if name == "Upscaler":
        from teasr.restore.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module teasr has no {name}")
