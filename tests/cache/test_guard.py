"""A tier may hang or fail: a look-up takes at most its deadline and returns a reason."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import pytest

from tests.worlds import fresh_process
from torchrec_kvshare.cache.guard import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    READERS,
    CircuitBreaker,
    GuardedTier,
)
from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.single_flight import SingleFlight
from torchrec_kvshare.cache.tiers import Found
from torchrec_kvshare.cache.write_behind import Write, WriteQueue
from torchrec_kvshare.errors import TierError

MAX_FAILURES, PAUSE_S = 3, 7.0
DEADLINE_S = 0.05
# A thread may take this long to wake up on a machine that is busy with the rest of the suite.
MARGIN_S = 2.0
PATIENCE_S = 20.0  # timeout of what ends at once if the code is right

KEYS = [("7e", "m-t.none"), ("8f", "m-t.none")]


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened_breaker(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(MAX_FAILURES, PAUSE_S, clock)
    for _ in range(MAX_FAILURES):
        assert breaker.allows_call()
        breaker.record_failure()
    return breaker


def in_threads(num_threads: int, run: Callable[[int], None]) -> None:
    """Run in several threads that start at the same moment, and wait for them."""
    barrier = threading.Barrier(num_threads)

    def begin(index: int) -> None:
        barrier.wait(PATIENCE_S)
        run(index)

    threads = [threading.Thread(target=begin, args=(index,)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# Circuit breaker.


@pytest.mark.parametrize("max_failures", [1, 3])
def test_a_breaker_opens_after_max_failures_in_a_row(max_failures: int) -> None:
    breaker = CircuitBreaker(max_failures, PAUSE_S, Clock())
    for _ in range(max_failures):
        assert (breaker.state, breaker.allows_call()) == (CLOSED, True)
        breaker.record_failure()
    assert (breaker.state, breaker.allows_call()) == (OPEN, False)


def test_a_success_between_failures_begins_the_count_anew() -> None:
    breaker = CircuitBreaker(MAX_FAILURES, PAUSE_S, Clock())
    for _ in range(4):
        breaker.record_failure()
        breaker.record_failure()
        breaker.record_success()
    assert breaker.allows_call()


def test_an_open_breaker_allows_one_trial_call_after_its_pause() -> None:
    clock = Clock()
    breaker = opened_breaker(clock)
    clock.now += PAUSE_S - 0.001
    assert not breaker.allows_call()
    clock.now += 0.001
    assert [breaker.allows_call() for _ in range(3)] == [True, False, False]
    assert breaker.state == HALF_OPEN
    clock.now += 10 * PAUSE_S
    assert not breaker.allows_call()  # The trial call has not ended yet.


def test_a_trial_that_fails_opens_the_breaker_for_a_whole_pause() -> None:
    clock = Clock()
    breaker = opened_breaker(clock)
    for _ in range(3):
        clock.now += PAUSE_S
        assert breaker.allows_call()
        clock.now += 1.0
        breaker.record_failure()
        clock.now += PAUSE_S - 0.001
        assert (breaker.state, breaker.allows_call()) == (OPEN, False)


def test_a_trial_that_succeeds_closes_the_breaker_until_as_many_fail_again() -> None:
    clock = Clock()
    breaker = opened_breaker(clock)
    clock.now += PAUSE_S
    assert breaker.allows_call()
    breaker.record_success()
    for _ in range(MAX_FAILURES):
        assert (breaker.state, breaker.allows_call()) == (CLOSED, True)
        breaker.record_failure()
    assert breaker.state == OPEN


def test_of_many_threads_exactly_one_gets_the_trial() -> None:
    clock = Clock()
    breaker = opened_breaker(clock)
    for _ in range(20):
        clock.now += PAUSE_S
        admitted: list[int] = []

        def ask(index: int, admitted: list[int] = admitted) -> None:
            if breaker.allows_call():
                admitted.append(index)

        in_threads(16, ask)
        assert len(admitted) == 1
        breaker.record_failure()


# A guarded tier.


class ScriptedTier:
    """A tier that does what a test tells it to."""

    name = "disk"

    def __init__(self) -> None:
        self.answer: Callable[[], object] = lambda: None
        self.held: Callable[[], int] = lambda: 0
        self.num_calls = 0
        self.threads: list[str] = []
        self.is_closed = False

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        self._call()
        return [Found(user.encode(), ()) for user, _ in keys]

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        self._call()
        return encoded_at > 100.0

    def forget(self, user: str, at: float) -> int:
        self._call()
        return 17

    def clear(self, version: str) -> int:
        self._call()
        return 19

    def held_bytes(self) -> int:
        return self.held()

    def close(self) -> None:
        self.is_closed = True

    def _call(self) -> None:
        self.num_calls += 1
        self.threads.append(threading.current_thread().name)
        self.answer()


class World:
    """A scripted tier behind its guard, and its metrics."""

    def __init__(self, deadline_s: float | None, max_failures: int = MAX_FAILURES) -> None:
        self.tier = ScriptedTier()
        self.clock = Clock()
        self.metrics = CacheMetrics()
        self.breaker = CircuitBreaker(max_failures, PAUSE_S, self.clock)
        self.guard = GuardedTier(self.tier, deadline_s, self.breaker, self.metrics)

    def failures(self) -> dict[str, int]:
        """Number of failures by kind."""
        snapshot = self.metrics.snapshot()
        kinds = ("deadline", "error", "breaker_open", "corrupt")
        counts = {
            kind: int(snapshot.value("tier_failures", tier="disk", kind=kind)) for kind in kinds
        }
        return {kind: count for kind, count in counts.items() if count}

    def timed(self) -> dict[str, int]:
        """Number of timed calls by operation."""
        return {
            dict(series.labels)["operation"]: histogram.count
            for series, histogram in self.metrics.snapshot().histograms.items()
        }


@pytest.fixture(params=[None, 5.0], ids=["memory", "with a deadline"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.guard.close()


class Hanging:
    """A tier with a deadline whose look-ups hang until the test is over."""

    def __init__(self) -> None:
        self.world = World(DEADLINE_S, max_failures=READERS + 2)
        self.end = threading.Event()
        self.world.tier.answer = self.hang

    def hang(self) -> None:
        self.end.wait(PATIENCE_S)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.end.set()
    made.world.guard.close()


def fail_with(error: BaseException) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


def test_a_tiers_answer_comes_as_it_is(world: World) -> None:
    assert world.guard.get(KEYS) == [Found(b"7e", ()), Found(b"8f", ())]
    assert world.failures() == {}
    assert world.timed() == {"get": 1}


def test_memory_is_asked_without_a_thread_between() -> None:
    world = World(None)
    world.guard.get(KEYS)
    assert world.tier.threads == [threading.current_thread().name]


def test_a_slow_look_up_costs_its_deadline_and_not_more(hanging: Hanging) -> None:
    start = time.monotonic()
    answer = hanging.world.guard.get(KEYS)
    elapsed_s = time.monotonic() - start
    assert answer == "deadline"
    assert DEADLINE_S <= elapsed_s < DEADLINE_S + MARGIN_S
    assert hanging.world.failures() == {"deadline": 1}


def test_look_ups_behind_those_that_hang_cost_no_more_either(hanging: Hanging) -> None:
    """All reader threads hang, so later look-ups do not start."""
    for _ in range(READERS):
        hanging.world.guard.get(KEYS)
    start = time.monotonic()
    assert hanging.world.guard.get(KEYS) == "deadline"
    assert time.monotonic() - start < DEADLINE_S + MARGIN_S
    assert hanging.world.tier.num_calls == READERS


def test_look_ups_do_not_wait_for_each_other() -> None:
    world = World(PATIENCE_S)
    together = threading.Barrier(READERS)
    world.tier.answer = lambda: together.wait(PATIENCE_S)
    answers: list[object] = []
    in_threads(READERS, lambda _: answers.append(world.guard.get(KEYS)))
    world.guard.close()
    assert answers == [[Found(b"7e", ()), Found(b"8f", ())]] * READERS


@pytest.mark.parametrize(
    "error",
    [TierError("down"), ValueError("odd"), KeyError("k"), MemoryError(), OSError(28, "no space")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_tier_raises_is_an_answer(world: World, error: Exception) -> None:
    world.tier.answer = fail_with(error)
    assert world.guard.get(KEYS) == "tier_error"
    assert world.guard.put("7e", "m-t.none", b"1", 200.0) == "error"
    assert world.failures() == {"error": 2}
    assert world.timed() == {"get": 1, "put": 1}


def test_a_store_that_gives_up_by_itself_is_an_answer_too(world: World) -> None:
    """A TimeoutError of a memory tier was taken for a missed deadline of a reader thread, but such
    a tier has no reader thread, and the request failed."""
    world.tier.answer = fail_with(TimeoutError("the socket was silent"))
    assert world.guard.get(KEYS) in ("deadline", "tier_error")
    assert world.guard.put("7e", "m-t.none", b"1", 200.0) == "error"
    assert sum(world.failures().values()) == 2


def test_a_tier_that_keeps_failing_is_not_called_any_more(world: World) -> None:
    world.tier.answer = fail_with(TierError("down"))
    answers = [world.guard.get(KEYS) for _ in range(MAX_FAILURES + 2)]
    assert answers == ["tier_error"] * (MAX_FAILURES + 2)
    assert world.tier.num_calls == MAX_FAILURES
    assert world.guard.put("7e", "m-t.none", b"1", 200.0) == "breaker_open"
    assert world.tier.num_calls == MAX_FAILURES
    assert world.failures() == {"error": MAX_FAILURES, "breaker_open": 2}


def test_a_tier_that_recovers_is_used_again_after_the_pause(world: World) -> None:
    world.tier.answer = fail_with(TierError("down"))
    for _ in range(MAX_FAILURES):
        world.guard.get(KEYS)
    world.tier.answer = lambda: None
    assert world.guard.get(KEYS) == "tier_error"
    world.clock.now += PAUSE_S
    assert world.guard.get(KEYS) == [Found(b"7e", ()), Found(b"8f", ())]
    assert world.breaker.state == CLOSED


def test_writes_that_fail_spare_look_ups_a_call(world: World) -> None:
    world.tier.answer = fail_with(TierError("full"))
    for _ in range(MAX_FAILURES):
        world.guard.put("7e", "m-t.none", b"1", 200.0)
    world.tier.answer = lambda: None
    assert world.guard.get(KEYS) == "tier_error"
    assert world.tier.num_calls == MAX_FAILURES


def test_a_write_says_whether_it_was_kept(world: World) -> None:
    assert world.guard.put("7e", "m-t.none", b"1", 100.1) == ""
    assert world.guard.put("7e", "m-t.none", b"1", 100.0) == "fenced"
    assert world.failures() == {}
    assert world.breaker.state == CLOSED


def test_removing_returns_the_bytes_or_none_after_a_failure(world: World) -> None:
    assert world.guard.remove(lambda tier: tier.forget("7e", 1.0)) == 17
    assert world.guard.remove(lambda tier: tier.clear("m-t")) == 19
    world.tier.answer = fail_with(TierError("down"))
    assert world.guard.remove(lambda tier: tier.forget("7e", 1.0)) is None
    assert world.failures() == {"error": 1}


def test_a_user_is_forgotten_even_by_a_tier_with_an_open_breaker(world: World) -> None:
    world.tier.answer = fail_with(TierError("down"))
    for _ in range(MAX_FAILURES):
        world.guard.get(KEYS)
    world.tier.answer = lambda: None
    assert world.guard.remove(lambda tier: tier.forget("7e", 1.0)) == 17


def test_an_outage_is_logged_when_it_begins_and_not_for_each_call(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.tier.answer = fail_with(TierError("the disk is gone"))
    with caplog.at_level(logging.WARNING):
        for _ in range(MAX_FAILURES + 5):
            world.guard.get(KEYS)
    [record] = caplog.records
    assert "tier disk is paused, its circuit breaker is open" in record.getMessage()
    assert "the disk is gone" in record.getMessage()


def test_closing_does_not_wait_for_a_look_up_that_hangs(hanging: Hanging) -> None:
    hanging.world.guard.get(KEYS)
    start = time.monotonic()
    hanging.world.guard.close()
    assert time.monotonic() - start < MARGIN_S
    assert hanging.world.tier.is_closed


def test_a_closed_tier_answers_as_one_that_fails() -> None:
    world = World(5.0)
    world.guard.close()
    assert world.guard.get(KEYS) == "tier_error"
    assert world.tier.num_calls == 0


HANG_AND_LEAVE = """
import threading, time
from torchrec_kvshare.cache.guard import CircuitBreaker, GuardedTier
from torchrec_kvshare.cache.metrics import CacheMetrics

class Hanging:
    name = "disk"
    def get(self, keys):
        threading.Event().wait()
    def close(self):
        pass

guard = GuardedTier(Hanging(), 0.05, CircuitBreaker(3, 1.0, time.monotonic), CacheMetrics())
print(guard.get([("7e", "m-t.none")]))
guard.close()
"""


def test_a_process_ends_though_a_look_up_hangs() -> None:
    """Python joins the threads of a ThreadPoolExecutor at exit: one look-up that hung kept the
    process from ending, even after close."""
    process = fresh_process(HANG_AND_LEAVE)
    try:
        output, _ = process.communicate(timeout=PATIENCE_S / 2)
    finally:
        process.kill()
        process.communicate()
    assert (output, process.returncode) == ("deadline\n", 0)


# Write-behind.

MAX_LENGTH, MAX_BYTES = 4, 100


class Gate:
    """A write that signals its start and then waits until the test lets it end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.end = threading.Event()

    def run(self) -> None:
        self.begun.set()
        assert self.end.wait(PATIENCE_S)


@pytest.fixture
def queue() -> Iterator[WriteQueue]:
    made = WriteQueue("test-writes", MAX_LENGTH, MAX_BYTES)
    yield made
    made.close(PATIENCE_S)
    assert not made._thread.is_alive()


@pytest.fixture
def gate(queue: WriteQueue) -> Iterator[Gate]:
    """A write that runs until the end of the test, so that later writes stay queued."""
    made = Gate()
    assert queue.offer(Write(made.run, 1))
    assert made.begun.wait(PATIENCE_S)
    yield made
    made.end.set()


def do_nothing() -> None:
    pass


def test_writes_are_made_in_their_order_and_one_at_a_time(queue: WriteQueue, gate: Gate) -> None:
    made: list[int] = []
    running = threading.Semaphore(1)

    def write(number: int) -> None:
        assert running.acquire(blocking=False)
        made.append(number)
        running.release()

    for number in range(MAX_LENGTH):
        assert queue.offer(Write(partial(write, number), number))
    assert made == []
    gate.end.set()
    assert queue.drain(PATIENCE_S)
    assert made == [0, 1, 2, 3]


def test_no_more_writes_wait_than_are_allowed(queue: WriteQueue, gate: Gate) -> None:
    offered = [queue.offer(Write(do_nothing, 2)) for _ in range(MAX_LENGTH + 2)]
    assert offered == [True] * MAX_LENGTH + [False] * 2
    assert (queue.length, queue.num_bytes) == (MAX_LENGTH, 2 * MAX_LENGTH)
    gate.end.set()
    assert queue.drain(PATIENCE_S)
    assert (queue.length, queue.num_bytes) == (0, 0)
    assert queue.offer(Write(do_nothing, 2))


def test_what_waits_holds_no_more_bytes_than_are_allowed(queue: WriteQueue, gate: Gate) -> None:
    assert not queue.offer(Write(do_nothing, MAX_BYTES + 1))
    assert queue.offer(Write(do_nothing, MAX_BYTES - 1))
    assert not queue.offer(Write(do_nothing, 2))
    assert queue.offer(Write(do_nothing, 1))
    assert queue.num_bytes == MAX_BYTES
    gate.end.set()
    assert queue.drain(PATIENCE_S)
    assert queue.offer(Write(do_nothing, MAX_BYTES))


def test_draining_waits_for_the_write_that_runs_too(queue: WriteQueue, gate: Gate) -> None:
    assert queue.length == 0
    assert not queue.drain(0.02)
    gate.end.set()
    assert queue.drain(PATIENCE_S)


def test_an_idle_queue_is_drained_at_once(queue: WriteQueue) -> None:
    assert queue.drain(0.0) or queue.drain(
        PATIENCE_S
    )  # The thread may not have started waiting yet.
    assert queue.drain(0.0)


def test_closing_makes_the_writes_that_wait_and_takes_none_after(
    queue: WriteQueue, gate: Gate
) -> None:
    made: list[int] = []
    for number in (5, 6):
        assert queue.offer(Write(partial(made.append, number), 1))
    closer = threading.Thread(target=queue.close, args=(PATIENCE_S,))
    closer.start()
    gate.end.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    assert made == [5, 6]
    assert not queue.offer(Write(do_nothing, 1))
    assert not queue._thread.is_alive()


def test_closing_waits_no_longer_than_agreed_for_a_write_that_hangs(
    queue: WriteQueue, gate: Gate
) -> None:
    start = time.monotonic()
    queue.close(0.05)
    assert time.monotonic() - start < 0.1 + MARGIN_S
    assert not queue.offer(Write(do_nothing, 1))


def test_threads_that_offer_lose_no_write_that_was_taken(queue: WriteQueue) -> None:
    made: list[int] = []
    taken: list[int] = []
    numbers = count()

    def offer(_: int) -> None:
        for _ in range(50):
            number = next(numbers)
            if queue.offer(Write(partial(made.append, number), 30)):
                taken.append(number)
            assert queue.num_bytes <= MAX_BYTES

    in_threads(8, offer)
    assert queue.drain(PATIENCE_S)
    assert len(taken) >= MAX_BYTES // 30
    assert sorted(made) == sorted(taken)


# Bytes of a tier.


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_bytes_of_a_tier_with_a_deadline_are_read_without_waiting_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A silent Redis blocked the reader of the gauge, the server's event loop, for a timeout."""
    monkeypatch.setattr("torchrec_kvshare.cache.guard.SIZE_POLL_S", 0.02)
    monkeypatch.setattr("torchrec_kvshare.cache.guard.MAX_SIZE_AGE_S", 0.5)
    world, is_over, asks = World(DEADLINE_S), threading.Event(), count()

    def held() -> int:
        next(asks)
        return 4000

    def hangs() -> int:
        is_over.wait(PATIENCE_S)
        return 5000

    world.tier.held = held
    until(lambda: world.guard.held_bytes() == 4000.0)
    world.tier.held = hangs
    start = time.monotonic()
    until(lambda: math.isnan(world.guard.held_bytes()))  # An old value is not returned.
    assert time.monotonic() - start < MARGIN_S
    is_over.set()
    until(lambda: world.guard.held_bytes() == 5000.0)
    world.tier.held = lambda: 1 // 0
    until(lambda: math.isnan(world.guard.held_bytes()))
    world.tier.held = held
    until(lambda: world.guard.held_bytes() == 4000.0)
    world.guard.close()
    time.sleep(0.2)
    num_asks = next(asks)
    time.sleep(0.2)
    assert next(asks) == num_asks + 1  # The thread has ended.


def test_the_bytes_of_a_memory_tier_are_exact() -> None:
    world = World(None)
    for held_bytes in (7, 11):
        world.tier.held = partial(int, held_bytes)
        assert world.guard.held_bytes() == held_bytes


# Single-flight.


def test_the_first_caller_leads_and_the_others_do_not() -> None:
    single_flight = SingleFlight()
    assert single_flight.lead(["a", "b", "a"]) == {"a", "b"}
    assert single_flight.lead(["b", "c"]) == {"c"}
    single_flight.finish({"a", "b"})
    assert single_flight.lead(["a", "b", "c"]) == {"a", "b"}


def test_waiting_ends_when_the_work_does() -> None:
    single_flight = SingleFlight()
    single_flight.lead(["a", "b"])
    waited: list[bool] = []
    waiting = threading.Thread(target=lambda: waited.append(single_flight.wait("a", PATIENCE_S)))
    waiting.start()
    single_flight.finish(["a"])
    waiting.join(PATIENCE_S)
    assert waited == [True]
    assert not single_flight.wait("b", 0.01)


def test_a_key_without_a_leader_is_not_waited_for() -> None:
    single_flight = SingleFlight()
    assert single_flight.wait("a", 0.0)
    single_flight.lead(["a"])
    single_flight.finish(["a"])
    assert single_flight.wait("a", 0.0)


def test_every_finish_is_counted_so_that_an_older_look_up_is_known_to_be_old() -> None:
    single_flight = SingleFlight()
    for number in range(3):
        assert single_flight.num_finished == number
        single_flight.finish(single_flight.lead([number]))
    assert single_flight.num_finished == 3


def test_of_many_threads_exactly_one_leads() -> None:
    single_flight = SingleFlight()
    for _ in range(20):
        leads: list[set[object]] = []
        in_threads(16, lambda _, leads=leads: leads.append(single_flight.lead(["a"])))
        assert sorted(map(len, leads)) == [0] * 15 + [1]
        single_flight.finish(["a"])


def test_a_write_that_fails_does_not_keep_others_from_being_made() -> None:
    queue = WriteQueue("test", 4, 100)
    done = threading.Event()

    def fails() -> None:
        raise KeyError("a bug")

    assert queue.offer(Write(fails, 1))
    assert queue.offer(Write(done.set, 1))
    assert done.wait(5.0)
    assert queue.drain(5.0)
    queue.close(5.0)
