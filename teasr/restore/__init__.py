"""Restoring pictures with a trained model: Upscaler, tiles, many files, the web page, a pipeline in diffusers' manner.

May import `backbones`, `methods`, `imaging` and `util`, and nothing of `training` or `tracking`: restoring needs neither DeepSpeed nor MLflow.
"""
