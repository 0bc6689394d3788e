"""Mosaic GPU kernels (Hopper)."""
