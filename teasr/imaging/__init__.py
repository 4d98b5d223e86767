"""Pictures as arrays: files in and out, colour, and the metrics that are exact formulas (PSNR, SSIM, Frechet distance).

Imports `util` alone; torch is imported only where a tensor is made.
"""
