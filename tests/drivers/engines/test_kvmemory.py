"""Blocks, what is remembered of them, and who may find it: against a plain account of it all."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llmos.drivers.engines.blocks import BlockPool
from llmos.drivers.engines.kvmemory import PAGE_TOKENS, KvMemory
from llmos.drivers.engines.prefixes import KEEP_S, LEAST_KEEP_S, MOST_KEEP_S, Pauses
from llmos.drivers.engines.sequence import Sequence
from llmos.drivers.protocols import SamplingParams


def sequence(tokens, tenant="t", new=1, adapter=""):
    made = Sequence("k", tokens, SamplingParams(max_new_tokens=new), tenant=tenant)
    made.adapter = adapter
    return made


def read(memory, seq, tokens=None):
    seq.read = len(seq.tokens) if tokens is None else tokens
    memory.written(seq)


PIECES = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map(
    lambda pieces: [ord(p) for piece in pieces for p in piece * PAGE_TOKENS]
)


class Machine(RuleBasedStateMachine):
    """Jobs of three groups come, read, write, go and are forgotten, in any order."""

    inside = Bundle("inside")

    def __init__(self):
        super().__init__()
        self.memory = KvMemory(3, 24, share=True)
        self.jobs = []
        self.content = {}
        self.clock = 0.0

    @rule(
        target=inside,
        tokens=PIECES,
        odd=st.integers(0, PAGE_TOKENS),
        group=st.sampled_from([("a", ""), ("b", ""), ("a", "x")]),
        new=st.integers(1, 40),
    )
    def come(self, tokens, odd, group, new):
        job = sequence(tokens + [7] * odd, group[0], new, group[1])
        pool, prefixes = self.memory.pool, self.memory.prefixes
        before = (pool.free, prefixes.idle)
        if not self.memory.reserve(job):
            found = prefixes.find(*group, job.tokens)
            need = -(-job.cache_tokens // PAGE_TOKENS) - len(found)
            assert need > sum(before) - sum(not n.users for n in found)
            assert (pool.free, prefixes.idle) == before
            return None
        assert len(job.blocks) == -(-job.cache_tokens // PAGE_TOKENS)
        assert job.read % PAGE_TOKENS == 0
        assert job.read < len(job.tokens)
        for i in range(job.read // PAGE_TOKENS):
            # What it was given holds its own tokens, of its own tenant and adapter.
            expected = (group, tuple(job.tokens[: (i + 1) * PAGE_TOKENS]))
            assert self.content[job.blocks[i]] == expected
        for block in job.blocks[job.read // PAGE_TOKENS :]:
            assert pool.holders(block) == 1
            self.content.pop(block, None)
        self.jobs.append(job)
        return job

    @rule(job=inside, tokens=st.integers(1, 40))
    def go_on(self, job, tokens):
        if job is None or job not in self.jobs:
            return
        for _ in range(tokens):
            if job.read == job.cache_tokens:
                break
            if job.read == len(job.tokens):
                job.tokens.append(5)
            job.read += 1
            at = job.read - 1
            block = job.blocks[at // PAGE_TOKENS]
            assert self.memory.pool.holders(block) == 1, "written into what others read"
            if job.read % PAGE_TOKENS == 0:
                self.content[block] = ((job.tenant, job.adapter), tuple(job.tokens[: job.read]))
        self.memory.written(job)
        for i in range(job.read // PAGE_TOKENS):
            held = self.content[job.blocks[i]]
            assert held == (
                (job.tenant, job.adapter),
                tuple(job.tokens[: (i + 1) * PAGE_TOKENS]),
            )

    @rule(job=consumes(inside), keep=st.integers(0, 20))
    def leave(self, job, keep):
        if job in self.jobs:
            self.jobs.remove(job)
            self.memory.release(job, self.clock + keep)
            assert (job.blocks, job.nodes, job.read) == ([], [], 0)

    @rule(seconds=st.integers(0, 15))
    def time_goes_by(self, seconds):
        self.clock += seconds
        again = self.memory.prefixes.expire(self.clock)
        assert again is None or again > self.clock

    @invariant()
    def all_is_well(self):
        self.memory.validate()
        held = {b for job in self.jobs for b in job.blocks}
        assert self.memory.used_tokens == len(held) * PAGE_TOKENS

    def teardown(self):
        for job in self.jobs:
            self.memory.release(job, 0.0)
        assert self.memory.used_tokens == 0
        self.memory.prefixes.expire(1e9)
        assert self.memory.pool.free == 24
        assert self.memory.prefixes.nodes == 0
        self.memory.validate()


TestKvMemory = Machine.TestCase
TestKvMemory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_held_block_is_free_when_the_last_lets_go():
    pool = BlockPool(0, 4)
    (block,) = pool.take(1)
    pool.hold(block)
    pool.give([block])
    assert pool.free == 3
    pool.give([block])
    assert pool.free == 4
    pool.validate()


def test_at_least_the_last_token_is_read_again():
    memory = KvMemory(0, 8, share=True)
    first = sequence([1] * 32)
    assert memory.reserve(first)
    read(memory, first)
    again = sequence([1] * 32)
    assert memory.reserve(again)
    assert again.read == 16
    longer = sequence([1] * 33)
    assert memory.reserve(longer)
    assert longer.read == 32


def test_nothing_is_found_where_sharing_is_off():
    memory = KvMemory(0, 8, share=False)
    for _ in range(2):
        job = sequence([1] * 40)
        assert memory.reserve(job)
        assert job.read == 0
        read(memory, job)
        memory.release(job, 1e9)
        assert memory.pool.free == 8


def test_the_same_tokens_read_twice_at_once_are_kept_once():
    memory = KvMemory(0, 8, share=True)
    jobs = [sequence([1] * 33) for _ in range(2)]
    for job in jobs:
        assert memory.reserve(job)
        assert job.read == 0
    for job in jobs:
        read(memory, job, 32)
    assert jobs[0].blocks[:2] == jobs[1].blocks[:2]
    assert memory.used_tokens == 4 * PAGE_TOKENS
    memory.validate()


def test_room_comes_from_what_was_used_least_lately():
    memory = KvMemory(0, 6, share=True)
    for token in (1, 2, 3):
        job = sequence([token] * 17)
        assert memory.reserve(job)
        read(memory, job, 16)
        memory.release(job, 1e9)
    assert memory.cached_tokens == 3 * PAGE_TOKENS
    again = sequence([1] * 17)
    assert memory.reserve(again)
    assert again.read == 16
    memory.release(again, 1e9)
    wide = sequence([9] * (4 * PAGE_TOKENS))
    assert memory.reserve(wide)
    peek = memory.prefixes.peek
    assert [peek("t", "", [token] * 17) for token in (1, 2, 3)] == [16, 0, 16]
    # What a job uses is no room for others.
    assert not memory.reserve(sequence([8] * (3 * PAGE_TOKENS)))
    memory.validate()


def test_what_is_kept_long_enough_is_forgotten():
    memory = KvMemory(0, 6, share=True)
    for token, until in ((1, 5.0), (2, 9.0)):
        job = sequence([token] * 33)
        assert memory.reserve(job)
        read(memory, job, 32)
        memory.release(job, until)
    assert memory.prefixes.expire(4.0) == 5.0
    assert memory.prefixes.expire(5.0) == 9.0
    assert memory.cached_tokens == 2 * PAGE_TOKENS
    assert memory.prefixes.expire(9.0) is None
    assert memory.cached_tokens == 0
    memory.validate()


class TestPauses:
    def test_an_agent_that_nobody_knows_is_given_some_time(self):
        pauses = Pauses()
        pauses.begins("t", "a", 10.0)
        assert pauses.ends("t", "a", 11.0) == 11.0 + KEEP_S

    def test_it_is_remembered_for_twice_its_usual_pause(self):
        pauses = Pauses()
        now = 0.0
        for _ in range(8):
            pauses.begins("t", "a", now)
            until = pauses.ends("t", "a", now + 1)
            now += 6
        assert until - (now - 5) == pytest.approx(10)
        # Another agent's pauses are its own.
        assert pauses.ends("t", "b", now) == now + KEEP_S

    @pytest.mark.parametrize(("pause", "keep"), [(0.001, LEAST_KEEP_S), (1e6, MOST_KEEP_S)])
    def test_within_bounds(self, pause, keep):
        pauses = Pauses()
        pauses.ends("t", "a", 0.0)
        pauses.begins("t", "a", pause)
        assert pauses.ends("t", "a", pause) == pause + keep

    def test_its_own_work_is_no_pause(self):
        pauses = Pauses()
        pauses.ends("t", "a", 0.0)
        pauses.begins("t", "a", 5.0)
        pauses.begins("t", "a", 900.0)
        assert pauses.ends("t", "a", 901.0) == 901.0 + 10.0
