from llmos.drivers.engines.queue import Fifo
from llmos.drivers.protocols import QueuedRequest


def request(key, submitted_s):
    return QueuedRequest(key, "t", "a", 1, 1, 0, None, submitted_s)


def test_who_came_first_enters_first_and_who_was_put_back_keeps_its_place():
    fifo = Fifo()
    assert fifo.first(0.0) is None
    for key, at in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        fifo.add(request(key, at), at)
    assert fifo.first(4.0) == "a"
    fifo.remove("a", 4.0)
    fifo.remove("b", 4.0)
    assert fifo.first(4.0) == "c"
    fifo.add(request("b", 2.0), 5.0)
    assert fifo.first(5.0) == "b"
    fifo.served("t", "a", 5, 5, 5.0)
    assert fifo.victim([request("a", 1.0)], 5.0) is None
