"""ttsnap: test-time scaling for text-to-image diffusion.

Start many candidates, look at each one's predicted clean image early, drop the poor ones, finish the promising ones.
"""

# `ttsnap.search` is the function; the module of that name is reached with `from ttsnap.search import run`.
from ttsnap.search import search

__all__ = ["search"]
__version__ = "0.1.0"
