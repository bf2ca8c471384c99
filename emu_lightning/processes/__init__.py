"""The mathematics of corruption and its reversal; knows no network and no trainer.

The words, as the whole package uses them (the field disagrees about several):

- ``t``: time in [0, 1], shape (B,); 0 is clean, 1 is noise. ``timesteps`` are integers, never ``t``.
- ``x_0``: data, images or latents (B, C, H, W). ``noise``: Gaussian, of the same shape.
- ``x_t = alpha_t * x_0 + sigma_t * noise``: the corrupted data. ``snr = alpha_t**2 / sigma_t**2``.
- ``prediction``: what a denoiser says about ``x_t``: ``noise``, ``velocity`` or ``x_0``. The velocity is
  ``alpha_t * noise - sigma_t * x_0`` under `Diffusion` and ``noise - x_0`` under `RectifiedFlow`.
- ``target``: what the prediction is trained to equal; ``loss_weight``: the factor (B,) on its squared error.
- ``denoiser``: ``(x_t, t, text) -> prediction``; with its text filled in, ``denoise``:
  ``(x_t, t) -> prediction``.
- ``guidance_scale``: 1.0 is off. ``uncond``: the condition of the empty (or negative) prompt.
- ``num_steps``: denoiser calls per sample. ``sampler``: the diffusers scheduler that makes them.
- ``rng``: where every random number comes from.
"""

from emu_lightning.processes.gaussian import Diffusion, Process, RectifiedFlow
from emu_lightning.processes.guidance import guide, guided

__all__ = ["Diffusion", "Process", "RectifiedFlow", "guide", "guided"]
