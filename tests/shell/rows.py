"""Sample rows as the journal keeps them, with all that trips a terminal."""

from __future__ import annotations

from typing import Any

from llmos.agents.messages import Answer, Citation, Question
from llmos.drivers.errors import EngineFailed
from llmos.drivers.stores.rows import JournalRow
from llmos.kernel import record
from llmos.syscalls.clock import Now
from llmos.syscalls.effects import Call, CallResult
from llmos.syscalls.errors import Cancelled, CapabilityDenied
from llmos.syscalls.generate import Generate, Generated
from llmos.syscalls.labels import Labels, Provenance
from llmos.syscalls.messages import Envelope, Message, Wire
from llmos.syscalls.retrieve import FoundPassage, Retrieve, Retrieved
from llmos.syscalls.rules import Evaluate, Fact, FiredRule, Verdict

NASTY = "a [/b] bracket, [red]colour[/red], :smile: and “quotes” \u202e \x1b[31m"
SOURCE = Provenance(kind="document", source="a.md", version="0123456789", span=(0, 4), corpus="c")
FIRED = FiredRule(rule="small", because=("(request)",), comment="Small amounts are paid back")
ANSWER = Answer(
    text=f"It is free. {NASTY}",
    decision="refund",
    grounded="extract",
    confidence=0.75,
    sources=(Citation(number=1, provenance=SOURCE, quote="Transfers are [/free]" * 9),),
    rules=(FIRED,),
    notice="Not advice",
)


AGENT, BEGAN = "acme/desk/main", 1_700_000_000.0


def syscall(seq: int, request: Any, result: Any, phase: str = "", **changes: Any) -> JournalRow:
    error = isinstance(result, BaseException)
    args = record.args_of(request)
    row = JournalRow(
        agent=AGENT,
        turn="t-0001",
        seq=seq,
        phase=phase or ("failed" if error else "result"),
        kind=type(request).__name__,
        name=request.resource,
        args_hash=record.hash_of(args),
        args=args,
        result=record.error_of(result) if error else record.result_of(result),
        provenance=record.pack_provenance(() if error else result.provenance),
        labels=record.pack_labels(Labels()),
        epoch=3,
        ts=BEGAN + 0.5 * seq,
        elapsed_s=0.25,
    )
    return row._replace(**changes)


def syscalls() -> list[JournalRow]:
    passage = FoundPassage(text=NASTY, title="T", score=0.5, meta={}, provenance=SOURCE)
    written = Generated(
        text=NASTY, finish="stop", prompt_tokens=7, new_tokens=20, queued_s=0.0, run_s=2.0
    )
    unmeasured = written.model_copy(update={"run_s": 0.0})
    fact = Fact.of("request", text=NASTY)
    prompt = Generate(model="chat", prompt=NASTY)
    return [
        syscall(
            1,
            Retrieve(corpus="help", query=NASTY),
            Retrieved(passages=(passage,) * 3, provenance=(SOURCE,) * 3),
        ),
        syscall(2, Evaluate(rules="desk", facts=(fact,)), Verdict(facts=(fact,), fired=(FIRED,))),
        syscall(3, prompt, written),
        syscall(4, prompt, unmeasured),
        syscall(5, prompt, EngineFailed("chat", NASTY)),
        syscall(6, Now(), CapabilityDenied("a/b/c", "clock", "", [])),
        syscall(7, prompt, Cancelled("generate of a/b/c", "its turn")),
    ]


def unusual() -> list[JournalRow]:
    """What effects, streams and code changes leave, in a turn without an end."""
    call = Call(tool="booking", arguments={"what": NASTY})
    booked = CallResult(output={"seat": 7}, reference="r", idem_key="key")
    prompt = Generate(model="chat", prompt=NASTY)
    intent = syscall(1, call, booked, "intent", idem_key="key")._replace(result=b"")
    piece = syscall(3, prompt, booked, "partial")
    piece = piece._replace(result=b'{"pieces": [["It ", 1], ["is", 1]]}')
    patched = JournalRow(AGENT, "t-0001", 1, "mark", "Patched", "ask-twice", ts=BEGAN, part=1)
    lost = EngineFailed("x", "nobody knows")
    return [
        intent,
        intent._replace(phase="result", result=record.result_of(booked)),
        patched,
        intent._replace(seq=2),
        intent._replace(seq=2, phase="unknown", result=record.error_of(lost)),
        piece,
        piece._replace(part=2, args=b"", result=b'{"pieces": [[" free", 1]]}'),
        intent._replace(seq=4),
        intent._replace(seq=4, phase="unknown", result=record.error_of(lost)),
        JournalRow(AGENT, "t-0001", 4, "mark", "Retry", "booking", ts=BEGAN, part=2),
    ]


def turn(
    number: int = 1, reply: Message | None = ANSWER, error: Any = None, **changes: Any
) -> JournalRow:
    wire = Wire.of(Question(text=NASTY))
    envelope = Envelope(AGENT, "client:1", wire, "client:1", number, asked=True, cause="")
    row = JournalRow(
        agent=AGENT,
        turn=f"t-{number:04d}",
        seq=0,
        phase="failed" if error else "result",
        kind="turn",
        name="Question",
        args=envelope.pack(),
        result=record.turn_result(
            Wire.of(reply) if reply is not None and error is None else None, error, 4, None
        ),
        idem_key=envelope.id,
        epoch=3,
        code_version="0123456789abcdef",
        ts=BEGAN + number - 1,
        elapsed_s=1.5,
    )
    return row._replace(**changes)


def failed(number: int = 2) -> JournalRow:
    return turn(number, error=EngineFailed("chat", NASTY))


STATUS: dict[str, Any] = {
    "system": "demo",
    "started_at": 1_700_000_000.0,
    "agents": 2,
    "processes": [
        {"name": "host:0", "state": "up", "incarnation": 1, "reason": ""},
        {"name": "device:cpu:0", "state": "given up", "incarnation": 4, "reason": NASTY},
    ],
    "devices": [
        {
            "name": "cpu:0",
            "product": "A [fast] one",
            "capacity_bytes": 2 << 30,
            "free_bytes": 1 << 30,
            "used_bytes": None,
            "threads": 2,
            "owners": {"model chat": {"reserved": 1 << 30}},
        }
    ],
    "slots": [
        {
            "model": "chat",
            "source": "hf:x",
            "state": "ready",
            "device": "cpu:0",
            "predicted_bytes": 1 << 30,
            "measured_bytes": None,
            "users": 2,
            "statistics": None,
            "error": None,
        },
        {
            "model": "big",
            "source": "hf:y",
            "state": "failed",
            "device": None,
            "predicted_bytes": 1 << 20,
            "measured_bytes": 1 << 20,
            "users": 0,
            "statistics": {"running": 3, "waiting": 4},
            "error": NASTY,
        },
    ],
    "missing_models": {"gone": f"no such model [models.gone] {NASTY}"},
    "knowledge": {
        "corpora": {
            "help": {"error": None, "ready": True, "passages": 7, "skipped": [{"path": "x"}]},
            "bad": {"error": NASTY, "ready": True, "passages": 0, "skipped": []},
        },
        "graphs": {"g": {"error": None, "ready": False, "nodes": 0, "edges": 0}},
    },
}
AGENTS = [
    {
        "agent": "acme/desk/main",
        "state": "ready",
        "host": "host:0",
        "models": ["chat", "embed"],
        "program": "m:Desk",
    }
]
