"""Pictures as arrays: reading and writing files, colour correction, and metrics (PSNR, SSIM, Frechet distance).

Imports only `util`; torch is imported only inside the functions that create tensors.
"""
