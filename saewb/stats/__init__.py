"""Statistics of directions, of correlation matrices and of which latents fire together. Nothing here needs a model."""
