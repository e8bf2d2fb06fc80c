"""saewb: the workbench for sparse autoencoders of language models, in the notebook."""
