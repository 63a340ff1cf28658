"""`python -m ttsnap`, which `accelerate launch -m ttsnap` needs."""

from ttsnap.cli import main

if __name__ == "__main__":
    main()
