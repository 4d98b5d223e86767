"""Restoring pictures with a trained model: `Upscaler`, tiling, many files, the web page, a diffusers-style pipeline.

May import `backbones`, `methods`, `imaging` and `util`, but not `training` or `tracking`: restoring needs neither
DeepSpeed nor MLflow.
"""
