"""All that needs a GPU, in one go and within a given time: python -m benchmarks.gpu_suite --out DIR [--minutes 8]

Runs the tests that need a GPU; times ResNet-50, dense and at half its multiply-adds, in fp16 and fp32, in every runtime
that is installed; measures the machine's peaks and sets both against each other. Writes NAME_OF_THE_GPU.json, .csv and
.html into DIR, the JSON anew after every group of networks, and prints rows for benchmarks/results/README.md. What
fails or does not fit into the time stands in the document with its reason.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import InputError, WorkError

LONGEST = 24 * 60


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if anything was measured, 1 if not, 2 if there is no GPU or the directory cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for everything (default: 8)")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= LONGEST:
        parser.error(f"--minutes is {options.minutes}, but must be above 0 and at most {LONGEST}.")

    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("PyTorch finds no CUDA GPU, and all of this suite is about one: check espalier doctor.\n")
        return 2
    from benchmarks.gpu_suite.run import Settings, run
    from benchmarks.harness.results import load

    try:
        path = run(Settings(options.out, options.minutes), torch.cuda.get_device_name(0))
    except (InputError, WorkError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, InputError) else 1
    return 0 if any(variant.measurements for variant in load(path).variants) else 1


if __name__ == "__main__":
    sys.exit(main())
