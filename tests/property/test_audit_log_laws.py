"""The log against a model of it: whatever is appended, refused, shredded, and wherever its process ends."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from audit.content import SealedPart, open_part
from audit.keystore import KeyNotHeld
from audit.leaf import Leaf
from audit.records import Record, RecordType
from audit.writer import AlreadyClosed, LogError, RecordMalformed
from tests.support.audit_log import ORIGIN, completed, denied, embedded_place, received, request_id, segment

TENANTS = ("acme-bank", "globex-health")
TEXTS = st.text(max_size=12).filter(lambda text: text.isprintable())


class LogMachine(RuleBasedStateMachine):
    """`statuses` and `texts` are the model; `leaves` counts what each log should hold beside the system's."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="probity-law-"))
        self.place = embedded_place(self.directory)
        self.log = self.place.open()
        self.tenants: dict[str, str] = {}
        self.statuses: dict[str, str] = {}
        self.texts: dict[str, list[str]] = {}
        self.shredded: set[str] = set()
        self.leaves: dict[str, int] = {}

    @initialize()
    def begin(self) -> None:
        self.receive("acme-bank")

    def _open(self) -> list[str]:
        return [request for request, status in self.statuses.items() if status == "received"]

    def _counted(self, tenant: str, more: int = 1) -> None:
        self.leaves[tenant] = self.leaves.get(tenant, 1) + more  # 1: log.opened

    def _new(self, tenant: str, status: str) -> str:
        request = request_id(len(self.tenants))
        self.tenants[request], self.statuses[request], self.texts[request] = tenant, status, []
        self._counted(tenant)
        return request

    @rule(tenant=st.sampled_from(TENANTS))
    def receive(self, tenant: str) -> None:
        self.log.append_blocking(received(self._new(tenant, "received"), tenant))

    @rule(tenant=st.sampled_from(TENANTS))
    def deny(self, tenant: str) -> None:
        self.log.append_blocking(denied(self._new(tenant, "denied"), tenant))

    @rule(tenant=st.sampled_from(TENANTS), count=st.integers(200, 600))
    def read_much(self, tenant: str, count: int) -> None:
        """Over the edges of batches and tiles."""

        async def append() -> None:
            record = Record(RecordType.AUDIT_READ, tenant, {"filter": "status"})
            await asyncio.gather(*(self.log.append(record) for _ in range(count)))

        asyncio.run(append())
        self._counted(tenant, count)

    @precondition(lambda self: self._open())
    @rule(data=st.data(), said=TEXTS)
    def speak(self, data: st.DataObject, said: str) -> None:
        request = data.draw(st.sampled_from(self._open()))
        asyncio.run(self.log.journal(segment(request, len(self.texts[request]), said, self.tenants[request])))
        self.texts[request].append(said)

    @precondition(lambda self: self._open())
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._open()))
        tenant = self.tenants[request]
        self.log.append_blocking(completed(request, tenant, ["".join(self.texts[request])]))
        self.statuses[request] = "completed"
        self._counted(tenant)

    @rule(data=st.data())
    def complete_what_is_not_open(self, data: st.DataObject) -> None:
        closed = [request for request in self.statuses if request not in self._open()] or [request_id(9_999_999)]
        request = data.draw(st.sampled_from(closed))
        with pytest.raises(AlreadyClosed):
            self.log.append_blocking(completed(request, self.tenants.get(request, TENANTS[0])))

    @precondition(lambda self: self._open())
    @rule(data=st.data())
    def receive_twice(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._open()))
        with pytest.raises(RecordMalformed):
            self.log.append_blocking(received(request, self.tenants[request]))

    @rule(tenant=st.sampled_from(TENANTS))
    def append_nonsense(self, tenant: str) -> None:
        if tenant not in self.leaves:
            self._counted(tenant, 0)  # the log is opened for whoever speaks of it
        with pytest.raises(LogError):
            self.log.append_blocking(Record(RecordType.REQUEST_RECEIVED, tenant, {}, "nonsense"))

    @rule(data=st.data())
    def shred(self, data: st.DataObject) -> None:
        closed = [request for request in self.statuses if request not in self._open()]
        if closed:
            request = data.draw(st.sampled_from(closed))
            assert self.log.keystore.destroy([self.place.key_id(request)]) == (request not in self.shredded)
            self.shredded.add(request)

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        if orderly:
            self.log.close()
        else:
            self.log._release()
        for request in self._open():
            self.statuses[request] = "interrupted"
            self._counted(self.tenants[request])
        self.log = self.place.open()

    @invariant()
    def the_index_and_the_leaves_are_the_models(self) -> None:
        assert dict(self.place.rows("SELECT request_id, status FROM request_index")) == self.statuses  # type: ignore[arg-type]
        sizes = {str(log): size for log, size in self.place.rows("SELECT log, count(*) FROM leaf GROUP BY log")}
        sizes.pop(f"{ORIGIN}/system")
        assert sizes == {f"{ORIGIN}/{tenant}": count for tenant, count in self.leaves.items()}

    def teardown(self) -> None:
        self.log.close()
        report = self.place.verify()
        assert report.first_wrong is None
        assert all(entry.leaves == entry.signed_size and not entry.unnumbered for entry in report.logs)
        log = self.place.open()
        try:
            for raw, nonce, ciphertext in self.place.rows(
                "SELECT bytes, nonce, ciphertext FROM leaf JOIN content USING (record_id) WHERE part = 'output'"
            ):
                leaf = Leaf.parse(bytes(raw))  # type: ignore[call-overload]
                self._check_output(log.keystore, log.keyring, leaf, bytes(nonce), bytes(ciphertext))  # type: ignore[call-overload]
        finally:
            log.close()
            shutil.rmtree(self.directory)

    def _check_output(self, keystore: object, keyring: object, leaf: Leaf, nonce: bytes, ciphertext: bytes) -> None:
        request = str(leaf.request)
        if self.statuses[request] == "received":
            return  # closed by this last start
        if request in self.shredded:
            with pytest.raises(KeyNotHeld):
                keystore.get(self.place.key_id(request))  # type: ignore[attr-defined]
            return
        tenant = self.tenants[request]
        key = keyring.encryption.unwrap(tenant, keystore.get(self.place.key_id(request)).wrapped)  # type: ignore[attr-defined]
        part = next(part for part in leaf.parts if part.name == "output")
        sealed = SealedPart(bytes.fromhex(part.com), bytes.fromhex(part.ct), nonce, ciphertext)
        output = json.loads(open_part(key, tenant, leaf.record, "output", sealed).plaintext)
        assert "".join(output) == "".join(self.texts[request])


TestLog = LogMachine.TestCase
TestLog.settings = settings(max_examples=6, stateful_step_count=25, suppress_health_check=list(HealthCheck))
