"""Large networks on small GPUs: frozen blocks in host memory, and frozen weights of 8 or 4 bits.

quantised.py stores frozen weights in fp8 or NF4, swapping.py keeps frozen blocks in host memory, checkpoints.py
keeps activations there, and sweeps.py lets several network calls pass through a block together. These files know no
particular backbone. They import `util`, lora.py, and each other.
"""
