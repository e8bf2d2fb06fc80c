"""Which latents tell texts apart: contrasts of two sets, sparse probes, and directions as latents."""
