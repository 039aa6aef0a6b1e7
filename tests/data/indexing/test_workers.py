"""Sharing out the work of the index builder."""

import time

from dinov2.data.indexing.workers import results


def _slowly(number):
    time.sleep(0.002)
    return number


def test_a_slow_taker_of_results_gets_all_of_them():
    # All that is under way is done whenever the taker comes back, which once ended the loop early.
    taken = []
    for number in results(_slowly, [(number,) for number in range(300)], 2, lambda: None, processes=False):
        taken.append(number)
        time.sleep(0.005)
    assert sorted(taken) == list(range(300))
