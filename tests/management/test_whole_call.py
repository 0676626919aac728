"""One call: under the lock, on settled books, verified in debug mode."""

import threading

import pytest

from pagedkv import KVCacheManager
from pagedkv.management.page_budget import PageBudget
from pagedkv.management.whole_call import closing_call, reading_call, whole_call, within


class Caller:
    """Calls that do what they are given."""

    def __init__(self):
        self._budget = PageBudget(2)

    @whole_call
    def call(self, *calls):
        return [one() for one in calls]

    @reading_call
    def read(self):
        return self._budget.is_torn

    @closing_call
    def close(self, one):
        one()


def test_verify_runs_once_at_the_end_of_the_outermost_call():
    caller, calls = Caller(), []
    caller._budget.verify = lambda: calls.append("verified")
    caller.call(lambda: within(Caller.call, caller, lambda: calls.append("inside")))
    assert calls == ["inside", "verified"]


def test_calls_inside_a_call_are_refused_answered_or_wait():
    caller, calls = Caller(), []
    with pytest.raises(ValueError, match="call must not be called inside another call of the manager"):
        caller.call(caller.call)
    assert caller.call(caller.read) == [True]
    assert not caller._budget.is_torn

    def fail():
        raise RuntimeError("late")

    caller.call(
        lambda: caller.close(lambda: calls.append("closed")), lambda: caller.close(fail), lambda: calls.append("inside")
    )
    assert calls == ["inside", "closed"]
    assert not caller._budget.is_torn


def test_lock_is_free_after_an_error_inside_and_the_books_are_whole():
    caller, verified = Caller(), []
    caller._budget.verify = lambda: verified.append(True)
    with pytest.raises(ZeroDivisionError):
        caller.call(lambda: 1 // 0)
    assert verified
    assert not caller._budget.is_torn
    thread = threading.Thread(target=caller.call)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RecursionError, SystemExit])
def test_books_are_settled_before_the_call_after_an_interrupt(error):
    def interrupt():
        raise error

    caller = Caller()
    with pytest.raises(error):
        caller.call(lambda: within(Caller.call, caller, interrupt))
    assert caller._budget.is_torn
    caller._budget.allocator._num_owners[0] = 7
    assert caller.call(lambda: caller._budget.allocator.num_owners(0)) == [0]
    assert not caller._budget.is_torn


def test_methods_keep_their_names_and_signatures():
    assert KVCacheManager.can_append.__name__ == "can_append"
    assert KVCacheManager(2, page_size=1).can_append(num_tokens=2)
