"""Searches on a real pipeline: the engine, and the session that prepares it."""
