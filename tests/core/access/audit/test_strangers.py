"""What people without a credential may write into the audit log: bounded, and what is left out is counted."""

from __future__ import annotations

from inferflux_core.access.audit.events import AuditEvent
from inferflux_core.access.audit.log import NoAudit
from inferflux_core.access.audit.strangers import PER_ADDRESS, TOGETHER, Strangers


class Kept(NoAudit):
    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record_soon(self, event: AuditEvent) -> None:
        self.events.append(event)


async def test_each_address_has_a_budget_and_the_rest_is_counted() -> None:
    audit, suppressed = Kept(), list[None]()
    strangers = Strangers(audit, lambda: suppressed.append(None))
    assert [strangers.may_write("192.0.2.1") for _ in range(PER_ADDRESS + 3)] == [True] * PER_ADDRESS + [False] * 3
    # The addresses of one IPv6 subscriber are one.
    written = [strangers.may_write(f"2001:db8::{i:x}") for i in range(PER_ADDRESS + 2)]
    assert written == [True] * PER_ADDRESS + [False] * 2
    assert strangers.may_write("192.0.2.2")
    assert len(suppressed) == 5
    strangers.flush()
    assert [(e.event, e.address, e.fields) for e in audit.events] == [
        ("requests.suppressed", "192.0.2.1", {"records": 3}),
        ("requests.suppressed", "2001:db8::/64", {"records": 2}),
    ]
    assert strangers.may_write("192.0.2.1"), "the next minute"
    strangers.flush()
    assert len(audit.events) == 2


async def test_all_addresses_together_have_one_too() -> None:
    audit = Kept()
    strangers = Strangers(audit, lambda: None)
    addresses = [f"10.{i >> 8}.{i & 255}.1" for i in range(TOGETHER + 5000)]
    assert sum(strangers.may_write(address) for address in addresses) == TOGETHER
    strangers.flush()
    assert sum(int(str(e.fields["records"])) for e in audit.events) == 5000
    assert len(audit.events) == 1001, "the summary is bounded as well"
    assert audit.events[-1].address == "others" or any(e.address == "others" for e in audit.events)
