"""ttsnap: test-time scaling for text-to-image diffusion.

Start many candidates, look at each one's predicted clean image early, drop the poor ones, finish the promising ones.
"""

__version__ = "0.1.0"
