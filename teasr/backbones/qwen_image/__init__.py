"""Qwen-Image (20 B parameters) as a dual-branch restorer, on diffusers' own transformer and VAE.

backbone.py is what the rest of teasr uses; transformer.py adds the second branch, modulation.py replaces a third of the weights by a table,
vae.py is the codec for single pictures. Imports other files of `backbones`, and `util`.
"""
