"""The algebra of flow matching and the losses, one equation of a paper a function, on plain tensors.

Imports nothing else of teasr: neither a network nor a configuration is known here.
"""
