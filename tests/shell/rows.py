"""Sample rows as the journal keeps them, with all that trips a terminal."""

from __future__ import annotations

from typing import Any

from llmos.agents.messages import Answer, Citation
from llmos.drivers.errors import EngineFailed
from llmos.drivers.protocols import SyscallRow, TurnRow, TurnStatus
from llmos.kernel import record
from llmos.syscalls.clock import Now
from llmos.syscalls.errors import CapabilityDenied
from llmos.syscalls.generate import Generate, Generated
from llmos.syscalls.labels import Labels, Provenance
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


def syscall(seq: int, request: Any, result: Any, status: Any = "ok") -> SyscallRow:
    error = isinstance(result, BaseException)
    return SyscallRow(
        turn="t-0001",
        seq=seq,
        name=type(request).__name__,
        resource=request.resource,
        started_s=0.5 * seq,
        elapsed_s=0.25,
        status=status,
        request=record.pack(request),
        result=record.pack_error(result) if error else record.pack(result),
        provenance=record.pack_provenance(() if error else result.provenance),
        labels=record.pack_labels(Labels()),
    )


def syscalls() -> list[SyscallRow]:
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
        syscall(5, prompt, EngineFailed("chat", NASTY), "error"),
        syscall(6, Now(), CapabilityDenied("a/b/c", "clock", "", []), "denied"),
        syscall(7, prompt, GeneratorExit(), "cancelled"),
    ]


def turn(number: int = 1, **changes: Any) -> TurnRow:
    fields: dict[str, Any] = {
        "turn": f"t-{number:04d}",
        "agent": "acme/desk/main",
        "epoch": 3,
        "kind": "Question",
        "message": record.pack({"text": NASTY, "data": {}}),
        "cause": "m1",
        "started_at": 1_700_000_000.0,
        "elapsed_s": 1.5,
        "status": TurnStatus.DONE,
        "reply": record.pack(ANSWER),
        "error": "",
    }
    return TurnRow(**{**fields, **changes})


def failed(number: int = 2) -> TurnRow:
    return turn(
        number, status=TurnStatus.FAILED, reply=record.pack(None), error=f"EngineFailed: {NASTY}"
    )


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
