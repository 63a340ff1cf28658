"""Replay at scale: curves of reward against budget, their intervals, tuned schedules and plots."""
