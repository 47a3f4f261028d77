"""Options that several tests give to a command."""

QUICKLY = ("--rounds", "2", "--seconds", "0.02", "--time", "2", "--processes", "1")
"""For `bench`, where its figures do not matter."""
