"""Pieces of work on threads: what runs where, and that results do not depend on it."""

import os
import signal
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import convbasis as cb
from convbasis import workers
from convbasis.workers import run_all, share

TENSOR = torch.zeros(1)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def where():
    return threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()


@pytest.mark.usefixtures("three_threads")
class TestShare:
    def test_threads_that_are_done_take_parts_of_the_others_tasks(self):
        idle, begun = threading.Barrier(3), threading.Event()

        def part():
            idle.wait(60)  # all three threads are at parts at the same time
            return where()

        def task(number):
            if number:
                assert begun.wait(60)
                return []
            begun.set()
            return share([part] * 3)

        found = run_all([lambda number=number: task(number) for number in range(3)], [TENSOR])
        assert len({name for name, *_ in found[0]}) == 3
        assert {(threads, recording) for _, threads, recording in found[0]} == {(1, False)}

    def test_results_come_in_order(self):
        def task():
            return share([lambda number=number: number for number in range(50)])

        assert run_all([task] * 7, [TENSOR]) == [[*range(50)]] * 7

    @pytest.mark.parametrize("mode", [False, True])
    def test_parts_run_in_the_mode_of_their_task(self, mode):
        with torch.inference_mode(mode):
            found = run_all([lambda: share([torch.is_inference_mode_enabled] * 9)] * 3, [TENSOR])
        assert found == [[mode] * 9] * 3

    def test_calls_from_several_threads_share_the_pool(self):
        def call():
            found.append(run_all([lambda: share([lambda: 1] * 9)] * 7, [TENSOR]))

        found = []
        callers = [threading.Thread(target=call, daemon=True) for _ in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert found == [[[1] * 9] * 7] * 20

    def test_threads_without_a_task_do_those_of_the_next_call(self):
        waits, done = threading.Event(), threading.Event()

        def wait():
            waits.set()
            return done.wait(60)

        found = []
        first = threading.Thread(
            target=lambda: found.extend(run_all([wait, lambda: 1], [TENSOR])), daemon=True
        )
        first.start()
        assert waits.wait(60)
        run_all([done.set, lambda: 1], [TENSOR])
        first.join(60)
        assert found == [True, 1]

    def test_modes_that_cannot_be_set_are_an_error(self, monkeypatch):
        def fail(*_):
            raise ValueError("no such mode")

        monkeypatch.setattr(workers, "_as_here", lambda: fail)
        with pytest.raises(ValueError, match="no such mode"):
            run_all([lambda: 1] * 3, [TENSOR])

    def test_a_part_that_fails_fails_its_task(self):
        def fail():
            raise ValueError("this part")

        with pytest.raises(ValueError, match="this part"):
            run_all([lambda: share([fail, *[lambda: 1] * 5])] * 3, [TENSOR])
        assert run_all([lambda: share([lambda: 1] * 3)] * 3, [TENSOR]) == [[1] * 3] * 3

    def test_parts_of_parts_and_parts_outside_of_tasks_run_one_after_another(self):
        assert {name for name, *_ in share([where] * 5)} == {threading.current_thread().name}

        def part():
            inner = share([where] * 5)
            return {name for name, *_ in inner} == {threading.current_thread().name}

        found = run_all([lambda: share([part] * 4)] * 3, [TENSOR])
        assert found == [[True] * 4] * 3


@pytest.mark.usefixtures("three_threads")
class TestRunAll:
    def test_results_come_in_order_though_tasks_end_in_another(self):
        ended, last = [], threading.Event()

        def task(number):
            if number == 0:
                assert last.wait(60)
            ended.append(number)
            if number == 5:
                last.set()
            return number

        assert run_all([lambda number=number: task(number) for number in range(6)], [TENSOR]) == [
            *range(6)
        ]
        assert ended.index(0) > ended.index(5)

    def test_operators_of_a_task_run_on_one_core_and_record_nothing(self):
        found = run_all([where] * 6, [TENSOR])
        assert {(threads, recording) for _, threads, recording in found} == {(1, False)}
        assert threading.current_thread().name not in {name for name, *_ in found}
        assert torch.get_num_threads() == 3
        assert torch.is_grad_enabled()

    def test_fewer_tasks_than_threads_share_the_cores(self):
        torch.set_num_threads(7)
        assert {threads for _, threads, _ in run_all([where] * 3, [TENSOR])} == {2}
        assert torch.get_num_threads() == 7

    def test_threads_that_begin_later_have_the_common_number(self):
        run_all([where] * 3, [TENSOR])
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [3]

    @pytest.mark.parametrize(
        ("tasks", "tensor", "mode"),
        [
            (1, TENSOR, torch.enable_grad),
            (6, torch.zeros(1, requires_grad=True), torch.enable_grad),
            (6, torch.zeros(1, device="meta"), torch.enable_grad),
            (6, TENSOR, lambda: FlopCounterMode(display=False)),
            (6, TENSOR, lambda: torch.device("cpu")),
        ],
        ids=["alone", "recorded", "elsewhere", "watched", "overridden"],
    )
    def test_work_that_stays_on_this_thread(self, tasks, tensor, mode):
        with mode():
            names = {name for name, *_ in run_all([where] * tasks, [tensor])}
        assert names == {threading.current_thread().name}

    def test_under_a_transform(self):
        def names(x):
            found.update(name for name, *_ in run_all([where] * 6, [TENSOR]))
            return x

        found = set()
        torch.func.vmap(names)(torch.zeros(2))
        assert found == {threading.current_thread().name}

    def test_what_needs_no_gradient_leaves_though_others_do(self):
        names = {name for name, *_ in run_all([where] * 6, [TENSOR])}
        assert threading.current_thread().name not in names

    def test_tasks_within_a_task_stay_there(self):
        for outer, inner in run_all(
            [lambda: (where()[0], run_all([where] * 6, [TENSOR]))] * 6, [TENSOR]
        ):
            assert {name for name, *_ in inner} == {outer}

    def test_inference_mode_is_that_of_the_caller(self):
        for mode in (True, False):
            with torch.inference_mode(mode):
                assert run_all([torch.is_inference_mode_enabled] * 3, [TENSOR]) == [mode] * 3

    def test_forward_mode_is_on_where_it_is_for_the_caller(self):
        for mode in (True, False):
            with forward_ad._set_fwd_grad_enabled(mode):
                assert run_all([torch._C._is_fwd_grad_enabled] * 3, [TENSOR]) == [mode] * 3

    def test_the_first_error_is_raised_and_the_rest_is_left(self):
        done, begin, raised = [], threading.Barrier(3), threading.Event()

        def fail(number):
            begin.wait(60)
            raise ValueError(number)

        def wait():
            raised.wait(60)
            done.append(1)

        tasks = [*(lambda number=number: fail(number) for number in range(3)), *[wait] * 500]
        with pytest.raises(ValueError, match="0"):
            run_all(tasks, [TENSOR])
        raised.set()
        assert run_all([lambda: 1] * 3, [TENSOR]) == [1] * 3  # they go on
        assert len(done) <= 3

    def test_threads_that_cannot_be_made_leave_nothing_waiting(self, monkeypatch):
        monkeypatch.setattr(workers, "_pools", {})
        begin, started = threading.Thread.start, []

        def start(thread):
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            begin(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                run_all([where] * 3, [TENSOR])
        for thread in started:
            thread.join(60)
            assert not thread.is_alive()
        assert run_all([lambda: 1] * 3, [TENSOR]) == [1] * 3

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_after_a_fork(self):
        run_all([where] * 3, [TENSOR])
        child = os.fork()
        if not child:
            os._exit(0 if run_all([lambda: 1] * 3, [TENSOR]) == [1] * 3 else 1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs ends the tests
        try:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            signal.alarm(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": 2, "correction": True},
        {"far_field": "segments", "key_weights": True},
        {"far_field": "conv"},
        {"strict": True, "blocks": 2},
    ],
)
def test_attention_is_bit_equal_on_any_number_of_threads(options, three_threads):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 900, 16, generator=g)
    key, value = torch.randn(2, 2, 2, 900, 16, generator=g)
    given = {"window": 64, "columns": 8, "enable_gqa": True, **options}
    threaded = cb.hybrid_attention_stats(query, key, value, **given)
    torch.set_num_threads(1)
    alone = cb.hybrid_attention_stats(query, key, value, **given)
    for ours, theirs in zip(threaded[:3], alone[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert threaded.dispatch == alone.dispatch
