"""ContrastPanel: the latents that tell two lists of texts apart."""
