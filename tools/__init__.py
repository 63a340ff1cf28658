"""What is not in the wheel: how the embedded model was made."""
