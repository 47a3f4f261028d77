"""Which models can be pruned, and how well: every model in a process of its own, in one table (`__main__`)."""
