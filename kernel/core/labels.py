"""The policy over labels: which flows are allowed.

One rule for now: data of a tenant stays with that tenant. What more there will be
(sensitivity ceilings, untrusted input before an effect) goes here and nowhere else.
"""

from __future__ import annotations

from llmos.syscalls.labels import Labels


def refusal(labels: Labels, from_tenant: str, to_tenant: str) -> str | None:
    """Why data with these labels may not flow between two tenants; None if it may."""
    if from_tenant == to_tenant:
        return None
    foreign = labels.tenants - {to_tenant}
    if foreign:
        return (
            f"this turn has seen data of {', '.join(sorted(foreign))}, "
            f"and the receiver belongs to {to_tenant}"
        )
    return None
