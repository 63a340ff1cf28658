"""ttsnap: the best image that a compute budget can buy from a text-to-image diffusion pipeline."""

__version__ = "0.1.0"
