"""The ledger: every byte of every device, reserved before it is used.

A reservation goes ``reserve → commit → release``. ``reserve`` takes the predicted size
before anything is loaded; ``commit`` replaces it by what was measured, so that the sum
stays true; ``release`` gives it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.drivers.errors import LlmosError


class LedgerError(LlmosError):
    """The ledger was asked for something that its account does not allow."""


class OverCapacity(LedgerError):
    """The reservation would exceed what the device has."""

    def __init__(self, device: str, owner: str, asked_bytes: int, free_bytes: int) -> None:
        self.device, self.owner = device, owner
        self.asked_bytes, self.free_bytes = asked_bytes, free_bytes
        super().__init__(
            f"{owner} asks for {asked_bytes} bytes of {device}, where {free_bytes} are free"
        )


class UnknownReservation(LedgerError):
    """No reservation of that owner on that device."""

    def __init__(self, device: str, owner: str) -> None:
        self.device, self.owner = device, owner
        super().__init__(f"{owner} holds nothing on {device}")


@dataclass(slots=True)
class Reservation:
    """Bytes of one owner on one device."""

    owner: str
    reserved_bytes: int
    """What was asked for before use."""
    committed_bytes: int | None = None
    """What was measured, once it is in use."""

    @property
    def held_bytes(self) -> int:
        """What the account counts: the prediction until it is measured, then the larger.

        The larger, since a model that takes less at rest than predicted still needs the
        predicted peak in its biggest step.
        """
        return max(self.reserved_bytes, self.committed_bytes or 0)


@dataclass(slots=True)
class Account:
    """One device's memory."""

    capacity_bytes: int
    reservations: dict[str, Reservation] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        """Bytes spoken for."""
        return sum(r.held_bytes for r in self.reservations.values())

    @property
    def free_bytes(self) -> int:
        """Bytes nobody has reserved; never negative, even where a measurement overran."""
        return max(0, self.capacity_bytes - self.held_bytes)


class Ledger:
    """The accounts of all devices."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.overruns: list[tuple[str, str, int]] = []
        """(device, owner, bytes) of measurements that overran what was free."""

    def open(self, device: str, capacity_bytes: int) -> None:
        """Add a device, or set its capacity anew when its process comes back."""
        if device in self.accounts:
            self.accounts[device].capacity_bytes = capacity_bytes
        else:
            self.accounts[device] = Account(capacity_bytes)

    def reserve(self, device: str, owner: str, size_bytes: int) -> None:
        """Set bytes aside.

        Raises:
            OverCapacity: they are not free; nothing was changed.
            LedgerError: unknown device, or the owner holds bytes there already.
        """
        account = self._account(device)
        if owner in account.reservations:
            raise LedgerError(f"{owner} holds bytes on {device} already")
        if size_bytes < 0:
            raise LedgerError(f"{owner} asks for {size_bytes} bytes of {device}")
        if size_bytes > account.free_bytes:
            raise OverCapacity(device, owner, size_bytes, account.free_bytes)
        account.reservations[owner] = Reservation(owner, size_bytes)

    def grow(self, device: str, owner: str, size_bytes: int) -> None:
        """Raise a reservation to at least this size.

        Raises:
            OverCapacity: the difference is not free; nothing was changed.
            UnknownReservation
        """
        account = self._account(device)
        reservation = account.reservations.get(owner)
        if reservation is None:
            raise UnknownReservation(device, owner)
        more = size_bytes - reservation.held_bytes
        if more > account.free_bytes:
            raise OverCapacity(device, owner, more, account.free_bytes)
        reservation.reserved_bytes = max(reservation.reserved_bytes, size_bytes)

    def commit(self, device: str, owner: str, measured_bytes: int) -> int:
        """Record what it really takes; returns measured minus reserved.

        A measurement above the reservation is recorded even where it overruns the
        capacity: the bytes are in use, and hiding them would make the account lie.
        """
        account = self._account(device)
        reservation = account.reservations.get(owner)
        if reservation is None:
            raise UnknownReservation(device, owner)
        reservation.committed_bytes = measured_bytes
        if account.held_bytes > account.capacity_bytes:
            self.overruns.append((device, owner, account.held_bytes - account.capacity_bytes))
        return measured_bytes - reservation.reserved_bytes

    def release(self, device: str, owner: str) -> int:
        """Give the bytes back; returns how many."""
        reservation = self._account(device).reservations.pop(owner, None)
        if reservation is None:
            raise UnknownReservation(device, owner)
        return reservation.held_bytes

    def free_bytes(self, device: str) -> int:
        """Bytes nobody has reserved."""
        return self._account(device).free_bytes

    def largest_capacity(self) -> tuple[str, int]:
        """The device with most memory, and how much; ("", 0) without devices."""
        return max(
            ((name, a.capacity_bytes) for name, a in self.accounts.items()),
            key=lambda item: item[1],
            default=("", 0),
        )

    def validate(self) -> None:
        """Every account adds up: no negative size, reserved sums within capacity."""
        for device, account in self.accounts.items():
            reserved = sum(r.reserved_bytes for r in account.reservations.values())
            assert reserved <= account.capacity_bytes, (device, reserved, account.capacity_bytes)
            for owner, r in account.reservations.items():
                assert owner == r.owner, (owner, r)
                assert r.reserved_bytes >= 0, r
                assert r.committed_bytes is None or r.committed_bytes >= 0, r

    def _account(self, device: str) -> Account:
        account = self.accounts.get(device)
        if account is None:
            raise LedgerError(f"The ledger knows no device {device!r}")
        return account
