"""The small convolutional backbone: a dual-branch U-Net at the grid of 4x4 px blocks that draws a residual.

A frozen trunk predicts a coarse restoration and how wrong it is; the two branches draw what is missing, at that scale.
May import what `backbones` may.
"""
