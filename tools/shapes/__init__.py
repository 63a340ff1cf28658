"""The scripts that made the embedded weights; each is one command, resumable after a kill."""
