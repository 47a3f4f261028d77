import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import InputError, WorkError
from compress.training.evaluation import evaluate
from deploy.export import export_onnx
from deploy.parity import Parity, check_parity, evaluate_runtime
from deploy.runtimes import Lane, Runtime, TensorSpec, open_runtime
from deploy.tolerance import TIE, TOLERANCES, Tolerance


class Table(Runtime):
    """Answers with fixed rows of logits, in order; the images are the row numbers."""

    def __init__(self, rows: list[list[float]]) -> None:
        self._rows = np.array(rows, np.float32)
        self.inputs = (TensorSpec("images", "float32", ("batch", 1, 1, 1)),)
        self.outputs = (TensorSpec("logits", "float32", ("batch", self._rows.shape[1])),)
        self.batch_sizes: list[int] = []

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers = batch["images"].reshape(-1).astype(int)
        self.batch_sizes.append(len(numbers))
        return {"logits": self._rows[numbers]}

    def _lane(self, prepared: object) -> Lane:
        raise NotImplementedError

    def description(self) -> dict:
        return {}


class Lookup(nn.Module):
    """The same as a module."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.rows[images.flatten().long()]


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)


def compare(expected: list[list[float]], actual: list[list[float]], batch_sizes: tuple[int, ...] = (1,)) -> Parity:
    return check_parity(Lookup(expected), Table(actual), numbers(len(expected)), batch_sizes=batch_sizes)


def test_errors_by_hand() -> None:
    parity = compare([[1.0, -4.0], [2.0, 1.0]], [[1.0, -4.5], [2.25, 1.0]])
    assert parity.max_relative_error == 0.5 / 4
    assert parity.mean_relative_error == (0.75 / 4) / (8 / 4)
    assert parity.rms_relative_error == pytest.approx(((0.5**2 + 0.25**2) / (1 + 16 + 4 + 1)) ** 0.5)
    assert parity.sqnr_db == pytest.approx(10 * np.log10(22 / 0.3125))
    assert parity.top1_agreement == 100
    assert parity.largest_flip == 0
    assert parity.samples == 2


def test_signal_over_noise_by_hand() -> None:
    # Off by a tenth everywhere: an error of 10 %, noise power of 1 %.
    parity = compare([[10.0, -20.0], [30.0, 40.0]], [[11.0, -18.0], [27.0, 44.0]])
    assert parity.rms_relative_error == pytest.approx(0.1)
    assert parity.sqnr_db == pytest.approx(20)
    same = compare([[1.0, 2.0]], [[1.0, 2.0]])
    assert (same.rms_relative_error, same.sqnr_db) == (0, np.inf)


def test_largest_flip_by_hand() -> None:
    # Row 0 puts 3 before 4, whose scale is 8; row 1 puts 9 before 10; row 2 agrees.
    parity = compare([[4.0, 3.0, -8.0], [10.0, 9.0, 0.0], [1.0, 0.0, 0.0]], [[0, 1, 0.0], [0, 1, 0], [1, 0, 0]])
    assert parity.largest_flip == 1 / 8
    assert parity.top1_agreement == pytest.approx(100 / 3)


def test_only_whole_batches_are_compared() -> None:
    rows = [[float(row), -1.0] for row in range(10)]
    runtime = Table(rows)
    parity = check_parity(Lookup(rows), runtime, numbers(10), batch_sizes=(1, 3, 8))
    assert runtime.batch_sizes == [1] * 10 + [3] * 3 + [8]
    assert [batch.samples for batch in parity.batches] == [10, 9, 8]
    assert parity.samples == 27
    assert parity.max_relative_error == 0
    parity.require(0.0)


def test_overall_takes_the_worst_error_and_averages_the_rest() -> None:
    # Row 2 is wrong in value and in class; the batches of two leave it out.
    parity = compare([[2.0, 1.0]] * 3, [[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]], batch_sizes=(1, 2))
    assert [batch.max_relative_error for batch in parity.batches] == [0.5, 0.0]
    assert parity.max_relative_error == 0.5
    assert parity.mean_relative_error == pytest.approx((2 / 6) / 1.5 * 3 / 5)
    assert parity.top1_agreement == pytest.approx(100 * (2 + 2) / 5)


def test_top1_agreement_by_hand() -> None:
    expected = [[3.0, 1.0, 0.0], [3.0, 3.0, 0.0], [100.0, 99.9995, 0.0], [100.0, 99.99, 0.0], [1.0, 2.0, 0.0]]
    actual = [[3.0, 1.0, 0.0], [3.0, 3.1, 0.0], [100.0, 101.0, 0.0], [100.0, 101.0, 0.0], [np.nan, 2.0, 0.0]]
    # agrees; a tie, so either class is right; apart by 5e-6 < TIE; apart by 1e-4: wrong; not a number: wrong
    assert compare(expected, actual, batch_sizes=(5,)).top1_agreement == pytest.approx(100 * 3 / 5)


def test_require_gives_the_figures() -> None:
    parity = compare([[1.0, -4.0], [2.0, 1.0]], [[1.0, -4.5], [2.25, 1.0]])
    parity.require(0.125)
    with pytest.raises(WorkError, match=r"at batch 1 .* error is 0\.12 \(tolerance 0\.001.*100\.00 % of 2 samples"):
        parity.require()


def test_a_flipped_class_within_tolerance_fails() -> None:
    parity = compare([[1.0, 0.9999]], [[0.9999, 1.0]])
    assert parity.max_relative_error < 1e-3
    with pytest.raises(WorkError, match=r"agrees on 0\.00 % of 1 samples"):
        parity.require()


def test_bounds_come_from_the_number_formats() -> None:
    assert TOLERANCES["fp32"] == Tolerance(max_relative_error=1e-3, largest_flip=TIE)
    assert TOLERANCES["fp16"].max_relative_error == 32 / 2**11
    assert TOLERANCES["bf16"].max_relative_error == 32 / 2**8
    assert TOLERANCES["int8"].sqnr_db == pytest.approx(10 * np.log10(12 * 128**2 / 100) - 23, abs=0.1)
    bits = np.random.default_rng(0).standard_normal(100_000)
    rounded = _rounded_to_e4m3(bits)
    one = 10 * np.log10((bits**2).sum() / ((bits - rounded) ** 2).sum())
    assert TOLERANCES["fp8"].sqnr_db == pytest.approx(one - 23, abs=0.1)


def _rounded_to_e4m3(values: np.ndarray) -> np.ndarray:
    subnormal = 2.0**-9
    step = np.maximum(2.0 ** (np.frexp(values)[1] - 4), subnormal)
    return np.round(values / step) * step


def test_each_precision_is_held_to_its_own_bounds() -> None:
    reference = [[1.0, 0.0], [0.0, 1.0]]
    by_one_percent = compare(reference, [[1.01, 0.0], [0.0, 1.0]])
    by_ten_percent = compare(reference, [[1.1, 0.0], [0.0, 1.0]])
    with pytest.raises(WorkError, match=r"error is 0\.01 \(tolerance 0\.001"):
        by_one_percent.require(TOLERANCES["fp32"])
    by_one_percent.require(TOLERANCES["fp16"])
    with pytest.raises(WorkError, match=r"error is 0\.1 \(tolerance 0\.016"):
        by_ten_percent.require(TOLERANCES["fp16"])
    by_ten_percent.require(TOLERANCES["bf16"])
    by_ten_percent.require(TOLERANCES["int8"])
    with pytest.raises(WorkError, match=r"signal is 3\.0 dB above the noise \(tolerance 10\.0 dB\) and .* 50\.00 %"):
        compare(reference, [[1.0, 0.0], [1.0, 1.0]]).require(replace(TOLERANCES["int8"], largest_flip=0))


def test_a_tie_within_the_precision_passes_and_a_sure_class_that_flips_does_not() -> None:
    close = compare([[1.0, 0.98], [50.0, 0.0]], [[0.99, 1.0], [50.0, 0.0]])
    assert close.top1_agreement == 50
    close.require(TOLERANCES["fp16"])
    # The error is small against the largest logit of all samples, but not for the sample itself.
    sure = compare([[0.1, 0.0], [50.0, 0.0]], [[0.0, 0.1], [50.0, 0.0]])
    assert sure.max_relative_error == pytest.approx(0.002)
    for precision in ("fp16", "bf16", "int8", "fp8"):
        with pytest.raises(WorkError, match=r"puts 1 of the largest logit below its own .* agrees on 50\.00 %"):
            sure.require(TOLERANCES[precision])


def test_figures_of_a_sound_file_are_json() -> None:
    same = compare([[1.0, 2.0]], [[1.0, 2.0]])
    assert all(np.isfinite(value) for value in asdict(same.batches[0]).values())
    assert asdict(TOLERANCES["int8"])["max_relative_error"] is None


def test_logits_that_are_not_finite() -> None:
    parity = compare([[1.0, 2.0]], [[float("nan"), 2.0]])
    assert parity.max_relative_error == parity.rms_relative_error == parity.largest_flip == np.inf
    assert parity.sqnr_db == -np.inf
    for tolerance in TOLERANCES.values():
        with pytest.raises(WorkError, match=r"inf"):
            parity.require(tolerance)
    with pytest.raises(WorkError, match="inf"):
        parity.require(1e9)
    with pytest.raises(WorkError, match="not finite"):
        compare([[float("inf"), 2.0]], [[1.0, 2.0]])


def test_zero_logits() -> None:
    assert compare([[0.0, 0.0]], [[0.0, 0.0]]).max_relative_error == 0
    assert compare([[0.0, 0.0]], [[0.0, 1e-9]]).max_relative_error == np.inf


def test_wrong_number_of_classes_and_too_few_samples() -> None:
    with pytest.raises(WorkError, match=r"\(1, 2\) and the artefact \(1, 3\)"):
        compare([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(InputError, match="at least 8 samples, but there are 2"):
        compare([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, batch_sizes=(1, 8))
    with pytest.raises(InputError, match="batch sizes"):
        compare([[1.0, 2.0]], [[1.0, 2.0]], batch_sizes=())


def test_exported_network_passes_and_a_changed_one_fails(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).train()
    model[1].running_var.uniform_(0.5, 2.0)
    samples = torch.randn(9, 1, 4, 4)
    runtime = open_runtime(export_onnx(model, tmp_path / "net.onnx", image_shape=(1, 4, 4)))
    check_parity(model, runtime, samples).require(1e-5)
    assert model.training

    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[4].weight[0, 0] += 0.5
    with pytest.raises(WorkError, match="does not compute what the model does"):
        check_parity(changed, runtime, samples).require()

    # 9 images in batches of 4: the last batch holds one; the labels are the model's own answers but for one.
    labels = model.eval()(samples).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    loader = DataLoader(TensorDataset(samples, labels), batch_size=4)
    found = evaluate_runtime(runtime, loader)
    expected = evaluate(model, loader)
    assert found.samples == 9
    assert found.top1 == pytest.approx(100 * 8 / 9) == expected.top1
    assert found.top5 == 100
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_artefact_with_two_inputs_is_refused() -> None:
    runtime = Table([[1.0, 2.0]])
    runtime.inputs = (*runtime.inputs, TensorSpec("mask", "float32", ("batch",)))
    with pytest.raises(InputError, match="2 inputs and 1 outputs"):
        check_parity(Lookup([[1.0, 2.0]]), runtime, numbers(1), batch_sizes=(1,))


def test_pixels_by_hand() -> None:
    # One image of 1 x 3 pixels and two classes; the scale of every pixel is the image's largest logit, 4.
    expected = np.array([[[[4.0, 0.0, 1.0]], [[0.0, 1e-3, 0.0]]]], np.float32)
    actual = np.array([[[[4.0, 2e-3, 0.5]], [[0.0, 1e-3, 0.0]]]], np.float32)

    class Pixels(Table):
        def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": actual}

    parity = check_parity(Constant(expected), Pixels([[0.0]]), numbers(1), batch_sizes=(1,))
    assert parity.max_relative_error == 0.5 / 4
    assert parity.top1_agreement == pytest.approx(200 / 3)
    assert parity.largest_flip == pytest.approx(1e-3 / 4)
    # The flip is more than a tie and less than what errors of 1e-3 allow: pixels on a border may flip.
    assert parity.applied(TOLERANCES["fp32"]) == Tolerance(max_relative_error=1e-3, largest_flip=2e-3)
    parity.require(0.2)
    with pytest.raises(WorkError, match=r"agrees on 66.67 % of the pixels of 1 samples"):
        parity.require()


class Constant(nn.Module):
    """The same dictionary of scores, whatever the images."""

    def __init__(self, scores: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("scores", torch.from_numpy(scores))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.scores[: len(images)], "aux": self.scores}
