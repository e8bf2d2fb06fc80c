"""Products of which only the largest entries are wanted.

precision   the product in the number format that the hardware multiplies fastest
tiles       the largest entries of a tile of it
pairs       (token, latent) pairs, and the products taken of them alone
rough       the two together: bf16 chooses candidates, float32 decides, a bound proves that none was missed
"""
