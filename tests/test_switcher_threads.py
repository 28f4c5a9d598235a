"""Passes, blocks and switches of many threads wait for each other, and for nothing else."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tallcodec import Switcher, errors

torch = pytest.importorskip("torch")

from switching import TASKS, WAIT, assert_on, pause, start  # noqa: E402


def test_a_forward_pass_cannot_switch_its_own_model(net, path):
    with Switcher(net, path, task="cars") as switcher:
        net.middle = lambda: switcher.switch("dtd")
        with pytest.raises(errors.SwitchError, match="in the middle of a forward pass"):
            net(torch.ones(1, 12))
        net.middle = lambda: None
        switcher.switch("dtd")  # the pass has ended, though by an error
        assert_on(net, path, "dtd")


def test_a_switch_waits_for_passes_and_passes_for_it(net, path):
    inside, go = threading.Event(), threading.Event()
    x = torch.ones(1, 12)
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        expected = {}
        for task in ("dtd", "cars"):
            switcher.switch(task)
            expected[task] = net(x)
        net.middle = lambda: (inside.set(), go.wait(WAIT))
        first, on_cars = start(lambda: net(x).detach())
        assert inside.wait(WAIT)
        switching, switched = start(lambda: switcher.switch("dtd"))
        while not switcher._gate._changers:
            pass
        second, on_dtd = start(lambda: net(x).detach())  # comes behind the switch
        switching.join(0.05)
        assert switching.is_alive() and switcher.current == "cars" and not on_dtd
        go.set()
        for thread in (first, switching, second):
            thread.join(WAIT)
        assert torch.equal(on_cars[0], expected["cars"]) and torch.equal(on_dtd[0], expected["dtd"])
        assert switched == [None]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_pass_without_a_word_does_not_lock_the_model(net, path, error):
    """torch calls its hooks for Exceptions only."""
    def stop():
        raise error()

    with Switcher(net, path, task="cars") as switcher:
        net.middle = stop
        thread, results = start(lambda: net(torch.ones(1, 12)))
        thread.join(WAIT)
        assert isinstance(results[0], error)
        with pytest.raises(error):
            net(torch.ones(1, 12))
        net.middle = lambda: None
        switching, switched = start(lambda: switcher.switch("dtd"))
        switching.join(WAIT)
        assert switched == [None]
        switcher.switch("cars")
        net(torch.ones(1, 12))
        assert not switcher._gate._uses


def test_a_block_may_be_left_in_another_thread(net, path):
    """As a dependency of a web framework, or a generator that another thread finishes."""
    with Switcher(net, path, task="cars") as switcher:
        block = switcher.task("dtd")
        thread, results = start(block.__enter__)
        thread.join(WAIT)
        assert results == [None] and switcher.current == "dtd"
        thread, results = start(lambda: block.__exit__(None, None, None))
        thread.join(WAIT)
        assert not results[0] and switcher.current == "cars" and not switcher._gate._uses
        switcher.switch("mnist")


def test_a_block_may_wait_for_passes_of_other_threads(net, path):
    x, inside = torch.ones(1, 12), threading.Event()
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def work():
            with switcher.task("dtd"):
                inside.set()
                while not switcher._gate._changers:
                    pass
                thread, results = start(lambda: net(x).detach())
                thread.join(WAIT)
                return results

        working, worked = start(work)
        assert inside.wait(WAIT)
        switching, switched = start(lambda: switcher.switch("mnist"))
        for thread in (working, switching):
            thread.join(WAIT)
        assert len(worked[0]) == 1 and switched == [None]
        assert switcher.current == "mnist"


def test_switches_do_not_keep_passes_out(net, path):
    stop, passes = threading.Event(), []
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def switch():
            while not stop.is_set():
                for task in TASKS:
                    switcher.switch(task)

        switching = [start(switch) for _ in range(3)]
        thread, _ = start(lambda: [passes.append(net(torch.ones(1, 12))) for _ in range(50)])
        thread.join(WAIT)
        stop.set()
        for other, results in switching:
            other.join(WAIT)
            assert results == [None]
    assert len(passes) == 50


def test_what_a_pass_leaves_behind_is_put_back_at_its_end(net, path):
    """A block that ends last is within a pass, which is not to be switched under."""
    opened, leave = threading.Event(), threading.Event()
    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        def outer():
            with switcher.task("dtd"):
                opened.set()
                leave.wait(WAIT)

        def within():
            with switcher.task("dtd"):
                leave.set()
                first.join(WAIT)

        first, results = start(outer)
        assert opened.wait(WAIT)
        net.middle = within
        net(torch.ones(1, 12))
        first.join(WAIT)
        assert results == [None] and switcher.current == "cars"
        assert_on(net, path, "cars")


def test_an_inner_block_does_not_keep_the_outer_from_restoring(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd"):
            with switcher.task("dtd", restore=False):
                pass
        assert switcher.current == "cars"


def test_a_block_puts_back_what_was(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd"):
            assert_on(net, path, "dtd")
            with switcher.task("dtd"):  # the same, once more
                net(torch.ones(1, 12))
            assert switcher.current == "dtd"
            for other in (switcher.task("mnist"), switcher.task(None)):
                with pytest.raises(errors.SwitchError, match="block of another task"), other:
                    pass
            with pytest.raises(errors.SwitchError):
                switcher.switch("cars")
            assert_on(net, path, "dtd")
        assert_on(net, path, "cars")
        with pytest.raises(ZeroDivisionError), switcher.task(None):
            1 / 0
        assert_on(net, path, "cars")
        with pytest.raises(errors.TaskNotFoundError), switcher.task("none"):
            pass
        assert switcher.current == "cars" and not switcher._gate._uses


def test_a_block_that_leaves_the_model_where_it_is(net, path):
    with Switcher(net, path, task="cars") as switcher:
        with switcher.task("dtd", restore=False):
            pass
        assert switcher.current == "dtd" and switcher.metrics.switches == 2
        with switcher.task("mnist"):
            assert_on(net, path, "mnist")
        assert switcher.current == "dtd"
        assert_on(net, path, "dtd")


def test_a_pass_that_dies_in_a_thread_of_a_pool(net, path):
    def die():
        raise SystemExit

    with Switcher(net, path, task="cars") as switcher, ThreadPoolExecutor(1) as pool:
        net.middle = die
        assert isinstance(pool.submit(net, torch.ones(1, 12)).exception(WAIT), SystemExit)
        switching, switched = start(lambda: switcher.switch("dtd"))
        switching.join(WAIT)
        assert switched == [None]


def start_together(switcher, task):
    """Three threads in blocks of a task, which end when all are in theirs."""
    together = threading.Barrier(3)

    def work():
        with switcher.task(task):
            together.wait(WAIT)

    return [start(work) for _ in range(3)]


def test_blocks_that_wait_for_a_switch_share_their_task(net, path):
    """Whoever is first puts the model on it, the others join."""
    with Switcher(net, path, task="cars") as switcher:
        writing, go = pause(switcher._plan, "write")
        switching, switched = start(lambda: switcher.switch("mnist"))
        assert writing.wait(WAIT)
        threads = start_together(switcher, "dtd")
        while switcher._gate._users < 3:
            pass
        go.set()
        for thread, results in [(switching, switched), *threads]:
            thread.join(WAIT)
            assert results == [None]
        assert switcher.current == "mnist" and switcher.metrics.switches == 4


def test_a_leaver_does_not_wait_for_a_block_that_needs_it(net, path):
    x = torch.ones(1, 12)

    def visit():
        with switcher.task("dtd"):
            pass

    def work():
        for _ in range(300):
            visiting = pool.submit(visit)
            with switcher.task("dtd"), torch.no_grad():
                pool.submit(net, x).result(WAIT)
            visiting.result(WAIT)

    with Switcher(net, path, task="cars") as switcher, ThreadPoolExecutor(1) as pool:
        thread, results = start(work)
        thread.join(3 * WAIT)
        assert results == [None] and switcher.current == "cars"


def test_a_pass_that_waits_for_closing(net, path):
    inside, go, x = threading.Event(), threading.Event(), torch.ones(1, 12)
    switcher = Switcher(net, path, task="cars")
    net.middle = lambda: (inside.set(), go.wait(WAIT))
    first, _ = start(lambda: net(x).detach())
    assert inside.wait(WAIT)
    closing, closed = start(switcher.close)
    while not switcher._gate._changers:
        pass
    second, results = start(lambda: net(x).detach())
    while not switcher._gate._users:
        pass
    go.set()
    for thread in (first, closing, second):
        thread.join(WAIT)
    assert closed == [None] and isinstance(results[0], torch.Tensor)


def test_passes_that_die_while_others_wait(net, path):
    def die():
        raise SystemExit

    with Switcher(net, path, task="cars") as switcher, torch.no_grad():
        net.middle = die
        threads = [start(lambda: net(torch.ones(1, 12))) for _ in range(4)]
        switching, switched = start(lambda: switcher.switch("dtd"))
        for thread, results in threads:
            thread.join(WAIT)
            assert isinstance(results[0], SystemExit)
        switching.join(WAIT)
        assert switched == [None]


@pytest.mark.parametrize("restore", [True, False])
def test_blocks_of_many_threads(net, path, restore):
    x, expected, wrong = torch.ones(1, 12), {}, []
    with Switcher(net, path) as switcher, torch.no_grad():
        for task in (None, *TASKS):
            switcher.switch(task)
            expected[task] = net(x)
        switcher.switch("cars")

        def work(seed):
            choose = random.Random(seed)
            with torch.no_grad():
                for _ in range(150):
                    task = choose.choice([None, *TASKS])
                    with switcher.task(task, restore=restore):
                        if not torch.equal(net(x), expected[task]):
                            wrong.append(task)

        threads = [start(lambda seed=seed: work(seed)) for seed in range(8)]
        for thread, results in threads:
            thread.join(60)
            assert results == [None]
        assert not wrong
        assert switcher.current == "cars" or not restore
        assert torch.equal(net(x), expected[switcher.current])
        assert not switcher._gate._uses and not switcher._blocks


def test_blocks_of_one_task_share_it(net, path):
    with Switcher(net, path, task="cars") as switcher:
        for thread, results in start_together(switcher, "dtd"):
            thread.join(WAIT)
            assert results == [None]
        assert switcher.current == "cars"
        assert switcher.metrics.switches == 3  # to cars, to dtd, and back
