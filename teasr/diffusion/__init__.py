"""Flow-matching algebra and losses on plain tensors, with one function per paper equation.

Files here import nothing else from teasr. They know neither networks nor configs.
"""
