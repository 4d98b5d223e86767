"""ComfyUI nodes that restore and enlarge pictures with a model of `teasr`."""

from .nodes import TeasrLoad, TeasrUpscale

NODE_CLASS_MAPPINGS = {"TeasrLoad": TeasrLoad, "TeasrUpscale": TeasrUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"TeasrLoad": "Load TEASR model", "TeasrUpscale": "TEASR upscale"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
