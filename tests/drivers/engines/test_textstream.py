from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmos.drivers.engines.blocks import BlockPool, run_start
from llmos.drivers.engines.textstream import StopFilter

ABC = st.text("abc", max_size=30)


@given(ABC, st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_the_cut_does_not_depend_on_how_text_arrives(text, stops, data):
    def run(pieces):
        stop = StopFilter(stops)
        out = []
        for piece in pieces:
            out.append(stop.push(piece))
            if stop.stopped:
                break
        return "".join(out) + stop.flush(), stop.stopped

    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert run(pieces) == run([text]) == run(list(text))
    shown, stopped = run([text])
    assert stopped == any(s in text for s in stops)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text


def test_what_could_be_a_stop_is_held_back_and_let_go():
    stop = StopFilter(["END"])
    assert stop.push("the E") == "the "
    assert stop.push("N") == ""
    assert stop.push("T E") == "ENT "
    assert stop.flush() == "E"


@given(st.lists(st.integers(1, 9), max_size=40), st.randoms(use_true_random=False))
def test_the_block_pool_never_lends_twice_and_ends_whole(sizes, chance):
    pool = BlockPool(2, 40)
    held: list[list[int]] = []
    for size in sizes:
        got = pool.take(size)
        if got is None:
            assert size > pool.free
            if held:
                pool.give(held.pop(chance.randrange(len(held))))
        else:
            assert len(got) == size
            held.append(got)
        lent = [b for h in held for b in h]
        assert len(lent) == len(set(lent)) == pool.capacity - pool.free
        assert all(2 <= b < 42 for b in lent)
    for h in held:
        pool.give(h)
    assert pool.free == 40
    assert run_start(pool.take(40)) == 2
