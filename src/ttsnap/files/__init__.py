"""What is stored: atomic writes here and in object stores, locks, provenance, pictures."""
