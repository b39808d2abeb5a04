"""Helpers that know nothing of flows: files, devices, processes, images, figures, the console."""
