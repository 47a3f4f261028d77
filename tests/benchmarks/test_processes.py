"""Sessions in processes of their own: the same answers as here, and a death that takes nobody with it."""

import os
import sys

import made_subjects
import pytest

from benchmarks.harness import processes
from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.measure import measure
from benchmarks.harness.processes import RemoteSession, call
from benchmarks.harness.rounds import Plan
from benchmarks.harness.session import LocalSession
from benchmarks.harness.subject import Candidate

QUICK = Plan(rounds=4, seconds=0.0, queries=5, warmup_s=0.0, time_budget_s=20, half_width=1.0, processes=2)


def sleeper(name="a", **arguments):
    return Candidate(name, made_subjects.open_sleeper, arguments)


def test_a_session_elsewhere_answers_as_one_here():
    remote = RemoteSession(sleeper())
    local = LocalSession("a", lambda: made_subjects.open_sleeper(), 1)
    try:
        for session in (remote, local):
            opened = session.ready()
            assert opened.load_s >= 0.02
            assert opened.first_ms >= 1
            assert opened.before_bytes > 1e6
            assert session.describe()["runtime"] == "sleeper"
            assert session.warm(0.01) >= 1e6
            timed = session.time(7)
            assert timed.latencies_ns.shape == (7,)
            assert (timed.latencies_ns >= 1e6).all()
            assert 0 <= timed.cpu_s < 0.1
            assert [stages.enqueued_ns - stages.issued_ns for stages in session.stages(2)] == [0, 0]
            assert session.memory().host_peak_bytes >= opened.before_bytes
        assert remote.describe()["pid"] != os.getpid()
        assert not remote.describe()["torch"]
        assert local.describe()["pid"] == os.getpid()
    finally:
        remote.close()
        local.close()
        remote.close()  # twice does no harm


def test_inputs_take_turns():
    session = LocalSession("a", lambda: made_subjects.Sleeper(0.0001, size=3), 1)
    session.ready()
    session.time(5)
    assert session._subject.seen == [0, 1, 2, 0, 1, 2]
    session.close()
    with pytest.raises(HarnessError, match="not open"):
        session.time(1)


def test_processes_are_fresh_and_replaced(tmp_path):
    measurement = measure([sleeper("a"), sleeper("b", seconds=0.002)], baseline="a", plan=QUICK)
    pids = {measured.description["pid"] for measured in measurement.variants.values()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert [len(measured.opened) for measured in measurement.variants.values()] == [2, 2]
    assert measurement.variants["b"].processes == (0, 0, 1, 1)
    assert measurement.variants["b"].speedup.value == pytest.approx(0.5, rel=0.2)
    assert measurement.variants["a"].memory[0].host_peak_bytes > 1e6
    assert measurement.variants["a"].conditions


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        (
            "die",
            r"'b' died while it was measured: its process ended with SIGSEGV; it last wrote: libdevice: out of luck",
        ),
        ("exit", "'b' died while it was measured: its process ended with exit code 3"),
        ("raise", "'b' failed while it was measured: device lost"),
    ],
)
def test_a_process_that_dies_mid_run_leaves_the_others_figures_standing(mishap, message):
    variants = [sleeper("a"), sleeper("b", at=9, then=mishap), sleeper("c", seconds=0.002)]
    measurement = measure(variants, baseline="a", plan=QUICK)
    assert set(measurement.variants) == {"a", "c"}
    assert len(measurement.variants["c"].rounds_ns) == 4
    (failure,) = measurement.failures.values()
    assert message in failure


def test_a_subject_that_never_answers_is_ended(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.3)
    session = RemoteSession(sleeper(at=3, then="hang"))
    session._worker.answer(10)
    session._here = True
    session.ready()
    with pytest.raises(HarnessError, match="gave no answer within 0 s"):
        session.time(3)
    session.close()


def test_what_opening_refuses_comes_through_as_it_is():
    with pytest.raises(HarnessInputError, match=r"^The file is made for another device: build it again\.$"):
        measure([sleeper("a"), Candidate("b", made_subjects.refuse)], baseline="a", plan=QUICK)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(HarnessInputError, match="function of an importable module"):
        RemoteSession(Candidate("a", lambda: None))


def test_one_call_in_a_process_of_its_own():
    assert call(made_subjects.add, {"a": 1, "b": 2}, what="Adding") == 3
    with pytest.raises(HarnessInputError, match="build it again"):
        call(made_subjects.refuse, {}, what="Refusing")
    with pytest.raises(HarnessError, match="Ending died while it was measured: its process ended with exit code 3"):
        call(os._exit, {"status": 3}, what="Ending")


def test_the_working_directory_is_not_imported_from(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in sys.path
    assert call(made_subjects.add, {"a": 1, "b": 2}, what="Adding") == 3
