"""Products of which only the largest entries are wanted.

precision   the product in the number format that the hardware multiplies fastest
topk        the largest entries of a tile of it
pairs       (token, latent) pairs, and the products taken of them alone
select      all together: low precision chooses candidates, full precision decides; of fixed weights, of a training step
"""
