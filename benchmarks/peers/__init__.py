"""Espalier beside other programs that do one of its jobs, one runnable module each."""
