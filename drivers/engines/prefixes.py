"""KV blocks that are remembered by the tokens they hold, for the next prompt that begins so.

A tree per tenant and adapter: each node is one full block, found by its tokens from
its parent. So a block is only ever found by somebody of the same tenant, with the same
adapter, whose prompt begins with the very same tokens: nobody learns from the time of
an answer what another tenant's prompt begins with. Tokens are compared themselves, not
a hash of them; a collision would hand over foreign keys and values.

What no job holds is free memory that still has a use. It is forgotten when somebody
needs the room (least recently used first) and when its agent has stayed away for long:
twice its usual pause between jobs.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import count

from llmos.drivers.engines.blocks import BlockPool

KEEP_S = 60.0
"""For an agent whose pauses are not known yet."""
LEAST_KEEP_S, MOST_KEEP_S = 1.0, 3600.0
MAX_AGENTS = 10_000
"""Agents whose pauses are remembered; the longest silent is forgotten first."""
_OLD = 0.7
"""Weight of the old estimate when a pause was seen: a few pauses, not one, change it."""


class Node:
    """One remembered block."""

    __slots__ = ("block", "children", "keep_until", "parent", "tokens", "used", "users")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], block: int) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0
        """Jobs that hold it now. They hold all its ancestors too."""
        self.used = 0
        """Serial number of the last use: no clock is too coarse to order by."""
        self.keep_until = 0.0


class _Root(Node):
    """The beginning of a tenant's tree; it is no block."""

    __slots__ = ("key",)

    def __init__(self, key: tuple[str, str]) -> None:
        super().__init__(None, (), -1)
        self.key = key


class Prefixes:
    """The trees of all tenants. Holds each block of a node once in the pool.

    Used by the engine's thread; :meth:`peek` by any.
    """

    def __init__(self, pool: BlockPool, page_tokens: int) -> None:
        self._pool, self._page = pool, page_tokens
        self._roots: dict[tuple[str, str], _Root] = {}
        self._serial = count(1)
        self._by_use: list[tuple[float, int, Node]] = []
        self._by_time: list[tuple[float, int, Node]] = []
        """Heaps of nodes that had no user and no child when they were put in. What has
        changed since is skipped, by comparing ``used``."""
        self.nodes = 0
        self.idle = 0
        """Blocks held by no job: room for whoever needs it."""

    # ------------------------------------------------------------ finding and remembering

    def peek(self, tenant: str, adapter: str, tokens: Sequence[int]) -> int:
        """How many of these tokens would be found now; a guess while others change the tree."""
        root = self._roots.get((tenant, adapter))
        return sum(1 for _ in self._walk(root, tokens)) * self._page

    def find(self, tenant: str, adapter: str, tokens: Sequence[int]) -> list[Node]:
        """The longest remembered beginning. At least the last token is never in it, since its
        logits are wanted."""
        return list(self._walk(self._roots.get((tenant, adapter)), tokens))

    def use(self, nodes: Sequence[Node]) -> None:
        """Somebody uses what was found, and holds its blocks, until :meth:`leave`."""
        for node in nodes:
            self._pool.hold(node.block)
            self._count(node)

    def add(
        self,
        tenant: str,
        adapter: str,
        nodes: list[Node],
        tokens: Sequence[int],
        blocks: list[int],
    ) -> None:
        """Remember the next full block of a job, ``nodes`` being those that it uses already.

        Where the same tokens are remembered with another block, the job is given that
        one in ``blocks`` and its own is freed.
        """
        at = len(nodes)
        parent = nodes[-1] if nodes else self._root(tenant, adapter)
        piece = tuple(tokens[at * self._page : (at + 1) * self._page])
        node = parent.children.get(piece)
        if node is None:
            node = Node(parent, piece, blocks[at])
            parent.children[piece] = node
            self._pool.hold(node.block)
            self.nodes += 1
            self.idle += 1
        else:
            self._pool.give([blocks[at]])
            self._pool.hold(node.block)
            blocks[at] = node.block
        self._count(node)
        nodes.append(node)

    def _count(self, node: Node) -> None:
        if not node.users:
            self.idle -= 1
        node.users += 1
        node.used = next(self._serial)

    def leave(self, nodes: list[Node], keep_until_s: float) -> None:
        """A job ends; what it used is kept until then, if there is room. It gives its blocks
        back to the pool itself."""
        # From the end, so that a parent is used after its children and is forgotten after them.
        for node in reversed(nodes):
            node.users -= 1
            node.used = next(self._serial)
            node.keep_until = max(node.keep_until, keep_until_s)
            if not node.users:
                self.idle += 1
                self._offer(node)
        nodes.clear()

    # ------------------------------------------------------------ forgetting

    def make_room(self, blocks: int) -> None:
        """Forget until that many blocks are free, or nothing is idle."""
        while self._pool.free < blocks and self._by_use:
            _, used, node = heapq.heappop(self._by_use)
            # The second field is the same number; heaps of both kinds hold equal triples.
            if self._forgettable(node, used):
                self._forget(node)

    def expire(self, now_s: float) -> float | None:
        """Forget what was kept long enough; returns when to come again, None: nothing is kept."""
        while self._by_time:
            until, used, node = self._by_time[0]
            if self._forgettable(node, used):
                if until > now_s:
                    return until
                heapq.heappop(self._by_time)
                self._forget(node)
            else:
                heapq.heappop(self._by_time)
        return None

    def _offer(self, node: Node) -> None:
        """It may be forgotten, if nothing is remembered below it."""
        if node.children or node.users or node.parent is None:
            return
        heapq.heappush(self._by_use, (node.used, node.used, node))
        heapq.heappush(self._by_time, (node.keep_until, node.used, node))
        for heap in (self._by_use, self._by_time):
            if len(heap) > 2 * self.nodes + 64:
                # Mostly what has been used again since: keep what still counts.
                heap[:] = [e for e in heap if self._forgettable(e[2], e[1])]
                heapq.heapify(heap)

    def _forgettable(self, node: Node, used: float) -> bool:
        return (
            node.used == used and not node.users and not node.children and node.parent is not None
        )

    def _forget(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        node.parent = None
        self._pool.give([node.block])
        self.nodes -= 1
        self.idle -= 1
        if isinstance(parent, _Root):
            if not parent.children:
                del self._roots[parent.key]
        else:
            self._offer(parent)

    # ------------------------------------------------------------ the trees

    def _root(self, tenant: str, adapter: str) -> Node:
        return self._roots.setdefault((tenant, adapter), _Root((tenant, adapter)))

    def _walk(self, node: Node | None, tokens: Sequence[int]) -> Iterator[Node]:
        end = len(tokens) - 1
        for at in range(0, end - self._page + 1, self._page):
            node = node.children.get(tuple(tokens[at : at + self._page])) if node else None
            if node is None:
                return
            yield node

    def _below(self, root: Node) -> Iterator[Node]:
        left = list(root.children.values())
        while left:
            node = left.pop()
            left += node.children.values()
            yield node

    def validate(self) -> None:
        """Check what must always hold; for tests. Raises AssertionError."""
        nodes = [n for root in self._roots.values() for n in self._below(root)]
        assert len(nodes) == self.nodes, (len(nodes), self.nodes)
        assert len({n.block for n in nodes}) == len(nodes), "a block is remembered twice"
        assert sum(not n.users for n in nodes) == self.idle
        offered = {id(n) for used, _, n in self._by_use if self._forgettable(n, used)}
        for node in nodes:
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            assert self._pool.holders(node.block) >= 1 + node.users
            assert all(node.users >= child.users for child in node.children.values())
            if not node.users and not node.children:
                assert id(node) in offered, "idle memory that nobody could have back"


class Pauses:
    """How long agents usually stay away between two of their jobs. Guarded by the engine's lock."""

    def __init__(self) -> None:
        self._agents: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        """Of each agent: when its last job ended, or -1 while one is inside; its usual pause, or
        -1. The longest silent comes first."""

    def begins(self, tenant: str, agent: str, now_s: float) -> None:
        """An agent has a job again."""
        known = self._agents.get((tenant, agent))
        if known is None or known[0] < 0:
            return
        pause = now_s - known[0]
        known[1] = pause if known[1] < 0 else _OLD * known[1] + (1 - _OLD) * pause
        known[0] = -1.0

    def ends(self, tenant: str, agent: str, now_s: float) -> float:
        """A job of an agent ends; returns until when to remember what it read."""
        known = self._agents.setdefault((tenant, agent), [-1.0, -1.0])
        known[0] = now_s
        self._agents.move_to_end((tenant, agent))
        if len(self._agents) > MAX_AGENTS:
            self._agents.popitem(last=False)
        keep = KEEP_S if known[1] < 0 else min(max(2 * known[1], LEAST_KEEP_S), MOST_KEEP_S)
        return now_s + keep
