"""Pictures as arrays: reading and writing files, colour correction, and exact metrics.

Imports only `util`; torch is imported only inside the functions that create tensors.
"""
