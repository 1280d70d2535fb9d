"""Processes, progress bars, memory, atomic file writes, random numbers."""
