"""Other cuts, codecs and micro-batches."""

from __future__ import annotations

from small_estimates import estimated

from fedsplit.estimation.alternatives import alternatives_of, codecs_of, cuts_of, micro_batches_of, shown


def test_all_combinations_are_compared_and_the_quickest_is_first() -> None:
    found = estimated(rounds=1)
    compared = alternatives_of(found)
    assert len(compared) == len(cuts_of(found)) * len(codecs_of(found)) * len(micro_batches_of(found))
    seconds = [one.seconds.round for one in compared]
    assert seconds == sorted(seconds)


def test_the_run_itself_is_among_them_and_shown_first() -> None:
    found = estimated(rounds=1)
    first, *others = shown(found, alternatives_of(found))
    assert (first.cut, first.codec, first.micro_batches) == ((1, 5), "raw", 1)
    assert first.seconds == found.seconds
    assert first.step_bytes == sum(found.traffic.step.values())
    own = (first.cut, first.codec, first.micro_batches)
    for one in others:
        choice = (one.cut, one.codec, one.micro_batches)
        assert sum(mine != other for mine, other in zip(own, choice, strict=True)) == 1


def test_micro_batches_divide_the_batch_and_a_gathered_batch_has_none() -> None:
    assert micro_batches_of(estimated(rounds=1, train__batch_size=6)) == [1, 2]
    assert micro_batches_of(estimated(rounds=1, trunk__schedule="batched")) == [1]
    assert cuts_of(estimated(rounds=1, trunk__stages="1:3:5")) == [(1, 5)]
