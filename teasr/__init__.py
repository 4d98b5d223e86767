"""TEASR: any-step real-world super-resolution by self-adversarial distillation in one diffusion transformer."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Import `Upscaler` on first use, so that `import teasr` alone does not load torch."""
    if name == "Upscaler":
        from teasr.restore.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module teasr has no {name}")
