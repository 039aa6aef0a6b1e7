"""Sharing out the work of the index builder."""

import time

from dinov2.data.indexing import workers


def _slowly(number):
    time.sleep(0.002)
    return number


def test_no_result_is_lost_where_all_workers_are_done_before_they_are_waited_for(monkeypatch):
    waiting = workers.wait

    def wait_late(*arguments):  # as on a busy machine, where this thread has to wait for its turn
        time.sleep(0.3)
        return waiting(*arguments)

    monkeypatch.setattr(workers, "wait", wait_late)
    items = [(number,) for number in range(300)]
    found = [
        number
        for batch in workers.results(_slowly, items, 2, lambda: None, processes=False)
        for number in batch
    ]
    assert sorted(found) == list(range(300))
