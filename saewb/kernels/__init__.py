"""Fast exact selection of the largest pre-activations, and products over selected (token, latent) pairs.

precision   matrix products in the number format that the hardware multiplies fastest
topk        the largest entries of a tile of pre-activations
pairs       (token, latent) pairs, and products computed for them alone
threads     how torch's threads wait for one another while other work needs the cores
select      low precision selects candidates, full precision decides; for fixed weights and for a training step
"""
