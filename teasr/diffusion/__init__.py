"""Flow-matching algebra and losses on plain tensors, with one function per paper equation, and perceptual distances.

Files here import `util.optional` alone from teasr. They know neither the networks that are trained nor configs.
"""
