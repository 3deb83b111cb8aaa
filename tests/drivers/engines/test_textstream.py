from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from llmos.drivers.engines.blocks import BlockPool, run_start
from llmos.drivers.engines.textstream import Detokenizer, StopFilter

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
    assert stop.push("the") == "the"
    assert stop.push(" ") == ""
    assert stop.push("E") == ""
    assert stop.push("N") == ""
    assert stop.held_pieces == 3
    assert stop.push("T") == " ENT"
    assert stop.held_pieces == 0
    assert stop.push("E") == ""
    assert stop.flush() == "E"


def test_pieces_are_held_back_whole():
    stop = StopFilter(["END"])
    assert stop.push("the E") == ""
    assert stop.push("") == ""
    assert stop.push("AR, E") == "the E"
    assert stop.held_pieces == 2
    assert stop.push("ND of it") == "AR, "
    assert stop.stopped


def test_blanks_wait_for_what_follows_them():
    stop = StopFilter([])
    assert stop.push("one.") == "one."
    assert stop.push("\n") == ""
    assert stop.push("\n") == ""
    assert stop.held_pieces == 2
    assert stop.push("two") == "\n\ntwo"
    assert stop.push(" ") == ""
    assert stop.flush() == " "


def test_a_stop_string_of_blanks_is_found_at_once():
    stop = StopFilter(["\n\n"])
    assert stop.push("one.") == "one."
    assert stop.push("\n") == ""
    assert stop.push("\n") == ""
    assert stop.stopped


def test_blanks_do_not_wait_for_ever():
    stop = StopFilter(["END"])
    out = "".join(stop.push("\n") for _ in range(10_000))
    assert 0 <= 10_000 - len(out) < StopFilter.MAX_BLANKS
    assert stop.held_pieces == 10_000 - len(out)


SPACED = st.text("abc ", max_size=30)


@given(SPACED, st.lists(st.text("abc ", min_size=1, max_size=4), max_size=4), st.data())
def test_what_was_let_out_can_be_gone_on_from(text, stops, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    whole = StopFilter(stops)
    out = ""
    shown = []
    for i, piece in enumerate(pieces):
        out += whole.push(piece)
        if whole.stopped:
            break
        told = "".join(pieces[: i + 1 - whole.held_pieces])
        assert out == told
        assert not out.endswith(" ")
        shown.append((told, i + 1 - whole.held_pieces))
    out += whole.flush()
    for before, after in shown:
        again = StopFilter(stops, before)
        rest = ""
        for piece in pieces[after:]:
            rest += again.push(piece)
            if again.stopped:
                break
        assert before + rest + again.flush() == out
        assert again.stopped == whole.stopped


def test_a_stop_may_begin_before_but_not_end_there():
    stop = StopFilter(["END", "xy"], "END, xy, EN")
    assert stop.push("") == ""
    assert stop.push("D") == ""
    assert stop.stopped
    stop = StopFilter(["END"], "the EN")
    assert stop.push("T") == "T"
    assert not stop.stopped


@given(ABC, st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_from_a_mark_on_nothing_is_let_out_before_the_end(text, marks, data):
    # The mark that is complete first counts; of marks within one another that may be the later.
    assume(not any(a is not b and a in b for a in marks for b in marks))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    held = StopFilter((), marks=marks)
    out = ""
    for i, piece in enumerate(pieces):
        out += held.push(piece)
        # Pieces are let out whole, and those that are held back are counted.
        assert out == "".join(pieces[: i + 1 - held.held_pieces])
    first = min((at for m in marks if (at := text.find(m)) >= 0), default=len(text))
    assert len(out) <= first
    assert out + held.flush() == text


def test_a_stop_string_after_a_mark_ends_the_text():
    held = StopFilter(["END"], marks=["<call>"])
    assert held.push("yes <ca") == ""
    assert held.push("ll>{}") == ""
    assert held.push(" EN") == ""
    assert held.push("D of it") == "yes <call>{} "
    assert held.stopped


def test_what_only_looked_like_a_mark_is_let_out():
    held = StopFilter([], marks=["<call>"])
    assert held.push("a <") == ""
    assert held.push("b>") == "a <b>"


def test_a_mark_does_not_begin_in_what_was_let_out_already():
    held = StopFilter([], "say <call", marks=["<call>"])
    assert held.push("> it") == "> it"


def test_everything_may_be_held_back():
    held = StopFilter(["END"], "before", hold_all=True)
    assert held.push("one ") == ""
    assert held.push("two") == ""
    assert held.held_pieces == 2
    assert held.flush() == "one two"


def test_special_tokens_that_are_asked_for_are_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<call>", "<stop>"])
    call, stop = backend.token_to_id("<call>"), backend.token_to_id("<stop>")
    a, half = backend.encode("aé", add_special_tokens=False).ids[:2]
    text = Detokenizer(backend, controls={call: "<call>"})
    assert [text.push(t) for t in (a, stop, call, a)] == ["a", "", "<call>", "a"]
    # Half a character before it never becomes a whole one.
    assert [text.push(t) for t in (half, call)] == ["", "<call>"]


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
