"""A fixed virtual scanner: what it makes of a T1-weighted volume is a simulated acquisition, and is labelled so."""

from __future__ import annotations

import zlib

import numpy as np
from scipy import ndimage

SLICE_FWHM_MM = 2.5
BIAS_AMPLITUDE = 0.3
NOISE = 0.05


def virtual_scan(volume: np.ndarray, *, spacing_mm: tuple[float, ...], case: str) -> np.ndarray:
    """Return (x, y, z) float32 from 0 to about 1000: inverted contrast, 2.5 mm slices, bias field, Rician noise.

    Intensities between the 1st and 99th percentile are inverted; a Gaussian of 2.5 mm full width at half maximum blurs
    the third axis; a smooth field multiplies by up to exp(+-0.3); the magnitude is taken after complex Gaussian noise
    of 5 % of the range. Bias field and noise are drawn from the case's name, so a case always looks the same.
    """
    generator = np.random.default_rng(zlib.crc32(case.encode()))
    low, high = np.percentile(volume, (1, 99))
    inverted = 1 - np.clip((volume.astype(np.float32) - low) / (high - low), 0, 1)
    blurred = ndimage.gaussian_filter1d(inverted, SLICE_FWHM_MM / 2.355 / spacing_mm[2], axis=2)
    biased = blurred * np.exp(BIAS_AMPLITUDE * _smooth_field(volume.shape, generator))
    real, imaginary = NOISE * generator.standard_normal((2, *volume.shape))
    return (1000 * np.hypot(biased + real, imaginary)).astype(np.float32)


def _smooth_field(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return a field between -1 and 1: one cosine an axis, of at most half a period across the volume."""
    axes = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    waves = [np.cos(np.pi * (generator.uniform(0.3, 1) * axis + generator.uniform(0, 2))) for axis in axes]
    return sum(waves) / len(waves)
