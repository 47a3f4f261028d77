"""Results documents of two runs against each other, for people and for CI."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.regression import compare_results
from benchmarks.harness.regression_limits import Judgement, judge, read_limits
from benchmarks.harness.regression_records import Regression
from benchmarks.harness.results import load
from compress.errors import InputError, WorkError

SUFFIX = ".json"


def are_results(first: Path, others: Sequence[Path]) -> bool:
    """Whether the arguments ask for two documents to be compared, not for files and their checkpoint.

    Raises:
        InputError: they are a mixture, or not two.
    """
    documents = [path for path in (first, *others) if path.suffix.lower() == SUFFIX and not path.is_dir()]
    if not documents:
        return False
    if len(documents) == 2 and len(others) == 1:
        return True
    raise InputError(
        f"{documents[0]} is a results document, which is compared with one other: give OLD.json NEW.json, or a "
        "checkpoint and the files made from it."
    )


def refuse_options(given: Sequence[str], *, form: str) -> None:
    """Refuse options that belong to the other of the two forms.

    Raises:
        InputError: there are some.
    """
    if given:
        verb = "belongs" if len(given) == 1 else "belong"
        raise InputError(f"{' and '.join(given)} {verb} to `espalier compare {form}`: leave it out, or give that form.")


def compare_documents(old: Path, new: Path, fail_on: Sequence[str]) -> tuple[Regression, Judgement]:
    """Compare two results documents and judge what changed.

    Raises:
        HarnessInputError: a document cannot be read, they have nothing in common, or `fail_on` cannot be used.
    """
    limits = read_limits(fail_on)
    regression = compare_results(load(old), load(new))
    return regression, judge(regression, limits)


def require(judgement: Judgement) -> None:
    """Raise what became worse than allowed.

    Raises:
        WorkError: one line for each regression.
    """
    problems = judgement.problems()
    if problems:
        raise WorkError("\n".join(problems))
