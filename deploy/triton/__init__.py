"""A Triton model repository from a run: `write_repository(run, name=..., max_batch=...)`."""

from deploy.triton.repository import Repository, write_repository

__all__ = ["Repository", "write_repository"]
