"""What is recorded of the machine."""

import json
import subprocess

import psutil
import torch

from benchmarks.harness.environment import environment


def test_the_facts_are_those_of_this_process(tmp_path):
    facts = environment(tmp_path)
    assert facts["libraries"]["torch"] == torch.__version__.partition("+")[0] or facts["libraries"]["torch"]
    assert facts["threads"]["torch_intra_op"] == torch.get_num_threads()
    assert facts["cpu"]["logical_cores"] == psutil.cpu_count()
    assert facts["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_no_repository_is_none(tmp_path):
    assert environment(tmp_path)["git"] is None


def test_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    assert environment(tmp_path)["git"] == {"commit": None, "dirty": True}
    git("add", ".")
    git("commit", "-m", "first")
    assert environment(tmp_path)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert environment(tmp_path)["git"]["dirty"] is True
