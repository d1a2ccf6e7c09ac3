"""Reading a real log: lists, stories, content, receipts and proofs that check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from audit.checkpoint import open_checkpoint
from audit.database import reader_engine
from audit.keys import Keyring
from audit.keystore import KeyStore
from audit.merkle import OutOfRange, ProofError, check_consistency, check_inclusion
from audit.query import QueryRefused, RequestQuery, RequestRow
from audit.reader import AuditReader, ContentErased, EvidenceDamaged, NotFound, NotSignedYet, ReadError
from audit.records import GuardrailEntry
from tests.support.ledger import ACME, GLOBEX, PRINCIPAL, Ledger, Tamper

NOW = datetime.now(UTC)
ALL = RequestQuery(NOW - timedelta(days=1), NOW + timedelta(days=1))
FOUND = GuardrailEntry("pii_in", "pii", "input", "redact", "redacted", {"card": 1})
PASSED = replace(FOUND, id="secrets_in", verdict="passed", counts={})
OUTPUT = replace(FOUND, id="pii_out", stage="output", verdict="flagged")


class Story:
    """What the log below holds."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory)
        with self.ledger as ledger:
            self.asked = ledger.ask(guardrails=(FOUND, PASSED))
            self.denied = ledger.deny(guardrails=(FOUND,))
            self.failed = ledger.receive(GLOBEX, principal=replace(PRINCIPAL, client="svc-other", purpose=None))
            ledger.fail(self.failed, GLOBEX)
            self.cancelled = ledger.receive()
            ledger.complete(self.cancelled, status="cancelled", guardrails=(OUTPUT,))
            self.more = [ledger.ask() for _ in range(140)]
        with self.ledger as ledger:
            self.last = ledger.ask(GLOBEX, identities={"subject": "jo@globex.example"})
        settings = self.ledger.settings
        self.keyring = Keyring.load(settings.keys)
        self.engine = reader_engine(settings.database_url)
        self.keystore = KeyStore.open(settings.keystore_url)
        self.reader = AuditReader(self.engine, self.keyring, self.keystore)

    def close(self) -> None:
        self.engine.dispose()
        self.keystore.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(tmp_path_factory.mktemp("reader"))
    yield story
    story.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Story]:
    """For tests that damage it."""
    story = Story(tmp_path)
    yield story
    story.close()


@pytest.fixture
def reader(shared: Story) -> AuditReader:
    return shared.reader


def _ids(reader: AuditReader, **filters: Any) -> list[str]:
    return [row.request_id for row in reader.requests(replace(ALL, **{"limit": 500, **filters})).requests]


# --- lists ---


def test_all_requests_of_the_window_newest_first(shared: Story) -> None:
    written = [shared.asked, shared.denied, shared.failed, shared.cancelled, *shared.more, shared.last]
    assert _ids(shared.reader) == written[::-1]


@pytest.mark.parametrize("limit", [1, 7, 144, 145, 146])
def test_slices_of_any_size_join_to_the_whole_without_a_gap_or_a_repeat(reader: AuditReader, limit: int) -> None:
    joined: list[RequestRow] = []
    after = None
    while True:
        part = reader.requests(replace(ALL, limit=limit, after=after))
        assert 1 <= len(part.requests) <= limit
        joined += part.requests
        if (after := part.after) is None:
            break
    assert [row.request_id for row in joined] == _ids(reader)


def test_each_filter_finds_what_it_says(shared: Story) -> None:
    reader = shared.reader
    assert _ids(reader, tenants=(GLOBEX,)) == [shared.last, shared.failed]
    assert _ids(reader, tenants=(GLOBEX, "unheard-of")) == [shared.last, shared.failed]
    assert _ids(reader, tenants=()) == _ids(reader, tenants=("unheard-of",)) == []
    assert _ids(reader, client="svc-other") == [shared.failed]
    assert _ids(reader, decision="deny") == _ids(reader, status="denied") == [shared.denied]
    assert _ids(reader, status="failed") == [shared.failed]
    assert _ids(reader, status="cancelled") == [shared.cancelled]
    assert len(_ids(reader, model="bank-chat")) == 145
    assert len(_ids(reader, model="sha256:7a")) == 144
    assert _ids(reader, model="bank") == []
    assert len(_ids(reader, purpose="complaint-summary")) == 144
    assert _ids(reader, tenants=(ACME,), status="denied", client="svc-crm") == [shared.denied]
    assert _ids(reader, tenants=(GLOBEX,), status="denied") == []


def test_a_person_is_found_by_identity_in_every_tenant_and_by_pseudonym(shared: Story) -> None:
    reader = shared.reader
    assert _ids(reader, subject="eve@acme.example") == [shared.denied]
    assert _ids(reader, subject="jo@globex.example") == [shared.last]
    assert shared.failed in _ids(reader, subject="mia@acme.example")
    pseudonym = reader.story(shared.denied).subject
    assert _ids(reader, subject=pseudonym) == [shared.denied]
    assert _ids(reader, subject="eve") == []


def test_a_guardrail_is_found_where_it_found_something(shared: Story) -> None:
    reader = shared.reader
    assert _ids(reader, guardrail="pii_in") == [shared.denied, shared.asked]
    assert _ids(reader, guardrail="pii_out") == [shared.cancelled]
    for other in ("secrets_in", "pii", "pii%", "%", "_"):
        assert _ids(reader, guardrail=other) == []


def test_the_window_holds_its_begin_and_not_its_end(shared: Story) -> None:
    received = datetime.fromisoformat(shared.reader.story(shared.asked).received_at)
    tick = timedelta(microseconds=1)
    assert shared.asked in _ids(shared.reader, since=received, until=received + tick)
    assert shared.asked not in _ids(shared.reader, since=received - tick, until=received)
    assert shared.asked not in _ids(shared.reader, since=received + tick, until=received + 2 * tick)


def test_a_row_shows_metadata_and_no_identity(shared: Story) -> None:
    row = next(row for row in shared.reader.requests(replace(ALL, status="cancelled")).requests)
    assert (row.tenant, row.client, row.status, row.decision) == (ACME, "svc-crm", "cancelled", "allow")
    assert row.guardrails == ("pii_out",)
    assert (row.prompt_tokens, row.completion_tokens) == (21, 5)
    assert row.model == {"alias": "bank-chat", "version": "sha256:7a"}
    assert row.completed_at is not None
    assert row.received_at <= row.completed_at
    assert "mia" not in repr(row)


@pytest.mark.parametrize(
    "filters",
    [
        {"since": datetime(2026, 1, 1)},
        {"since": datetime(1969, 1, 1, tzinfo=UTC)},
        {"until": ALL.since},
        {"until": ALL.since - timedelta(1)},
        {"until": ALL.since + timedelta(days=5000)},
        {"limit": 0},
        {"limit": 501},
        {"limit": -1},
        {"decision": "maybe"},
        {"status": "done"},
        {"subject": ""},
        {"client": "nul\0"},
        {"model": "\ud800"},
        {"purpose": "x" * 513},
        {"guardrail": "a|b"},
        {"after": "x"},
        {"after": "1.2"},
        {"after": "1.' OR 1=1 --"},
        {"after": "9" * 19 + "." + "0" * 36},
    ],
)
def test_a_filter_of_another_form_is_refused(filters: dict[str, Any]) -> None:
    with pytest.raises(QueryRefused):
        replace(ALL, **filters)


@pytest.mark.parametrize("text", ["' OR '1'='1", "%", "\\", "é" * 300, "a'; DROP TABLE leaf; --"])
def test_a_filter_is_a_value_and_never_text_of_a_statement(reader: AuditReader, text: str) -> None:
    for name in ("subject", "client", "model", "purpose", "guardrail"):
        assert _ids(reader, **{name: text}) == []


# --- stories ---


def test_the_story_of_a_completed_request_has_the_shape_of_the_contract(shared: Story) -> None:
    story = asdict(shared.reader.story(shared.asked))
    assert list(story) == [
        "request_id", "tenant", "subject", "client", "purpose", "received_at", "completed_at", "status", "decision",
        "model", "sampling", "usage", "guardrails", "limits", "timings", "records",
    ]  # fmt: skip
    assert (story["request_id"], story["tenant"], story["status"]) == (shared.asked, ACME, "completed")
    assert story["decision"] == {
        "effect": "allow", "policy": "sha256:9f", "reasons": [{"code": "rule", "rule": "summaries"}],
    }  # fmt: skip
    assert story["model"]["weights"] == "sha256:e3"
    assert story["sampling"]["seed"] == "17"
    assert story["usage"] == {"prompt_tokens": 21, "cached_tokens": 16, "completion_tokens": 5}
    assert [entry["id"] for entry in story["guardrails"]] == ["pii_in", "secrets_in"]
    assert [(entry["reserved"], entry["used"]) for entry in story["limits"]] == [(512, 26)]
    assert story["timings"]["total_us"] == 9000
    assert [entry["type"] for entry in story["records"]] == ["request.received", "request.completed"]
    assert [entry["leaf_index"] for entry in story["records"]] == [1, 2]
    assert set(story["records"][0]) == {"type", "writer_seq", "leaf_index", "leaf_hash"}


def test_a_story_shows_no_identity_and_no_content(shared: Story) -> None:
    for request_id in (shared.asked, shared.denied):
        told = repr(shared.reader.story(request_id))
        assert not any(text in told for text in ("mia", "eve", "10.2.3.4", "4111", "summary."))


def test_the_story_of_each_other_ending(shared: Story) -> None:
    denied = shared.reader.story(shared.denied)
    assert (denied.status, denied.completed_at) == ("denied", denied.received_at)
    assert denied.decision["effect"] == "deny"
    assert denied.sampling == {}
    failed = shared.reader.story(shared.failed)
    assert (failed.status, failed.tenant, failed.usage) == ("failed", GLOBEX, {"prompt_tokens": 21})
    assert [entry["reserved"] for entry in failed.limits if isinstance(entry, dict)] == [512]
    assert shared.reader.story(shared.cancelled).status == "cancelled"


def test_an_open_and_then_an_interrupted_request_tell_their_story(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with ledger:
        opened = ledger.receive()
        assert ledger.log is not None
        reader = AuditReader(ledger.log.database.reader, ledger.log.keyring, ledger.log.keystore)
        story = reader.story(opened)
        assert (story.status, story.completed_at) == ("received", None)
        assert reader.reveal(opened).output is None
    with ledger:
        assert ledger.log is not None
        reader = AuditReader(ledger.log.database.reader, ledger.log.keyring, ledger.log.keystore)
        assert reader.story(opened).status == "interrupted"
        assert reader.reveal(opened).output == b"[]"
        assert [row.status for row in reader.requests(ALL).requests] == ["interrupted"]


def test_a_request_nobody_made_is_not_found(reader: AuditReader) -> None:
    for ask in (reader.story, reader.reveal, reader.leaves, reader.receipts, reader.tenant_of):
        with pytest.raises(NotFound):
            ask("0193f0c2-0000-7000-8000-000000000000")


# --- content ---


def test_revealed_content_is_what_was_recorded(shared: Story) -> None:
    revealed = shared.reader.reveal(shared.asked)
    assert revealed.prompt == b'{"messages":[{"content":"card 4111 1111 1111 1111"}]}'
    assert revealed.prompt_to_model == b"card [redacted]"
    assert revealed.output == b'["Here is a summary."]'
    assert revealed.output_tokens == b"[[1,2,3,4,5]]"
    assert revealed.identities == {"subject": "mia@acme.example", "source": "10.2.3.4"}
    assert not any(text in repr(revealed) for text in ("4111", "redacted", "mia"))


def test_revealing_a_denied_request_shows_its_prompt_alone(shared: Story) -> None:
    revealed = shared.reader.reveal(shared.denied)
    assert revealed.prompt == b'{"prompt":"denied"}'
    assert revealed.identities == {"subject": "eve@acme.example"}
    assert (revealed.prompt_to_model, revealed.output, revealed.output_tokens) == (None, None, None)


def test_content_whose_key_was_destroyed_is_erased_and_its_story_stays(own: Story) -> None:
    with Tamper(own.ledger.path) as tamper:
        key = tamper.one("SELECT key_id FROM request_index WHERE request_id = :r", r=own.asked)[0]
    assert own.keystore.destroy([str(key)]) == 1
    with pytest.raises(ContentErased):
        own.reader.reveal(own.asked)
    assert own.reader.story(own.asked).status == "completed"
    assert own.reader.reveal(own.cancelled).prompt is not None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE content SET ciphertext = zeroblob(80) WHERE part = 'prompt'",
        "DELETE FROM content WHERE part = 'output'",
        "UPDATE content SET key_id = (SELECT key_id FROM content WHERE log LIKE '%globex%' LIMIT 1)",
        "UPDATE leaf SET bytes = zeroblob(9) WHERE type = 'request.received'",
        "UPDATE leaf SET leaf_hash = zeroblob(32) WHERE type = 'request.received'",
    ],
)
def test_damaged_evidence_is_refused_not_shown(own: Story, statement: str) -> None:
    with Tamper(own.ledger.path) as tamper:
        assert tamper.run(statement)
    with pytest.raises(EvidenceDamaged, match="verify"):
        own.reader.reveal(own.asked)


# --- proofs ---


def test_every_receipt_of_a_request_leads_to_a_proof_that_checks(shared: Story) -> None:
    for request_id, tenant in ((shared.asked, ACME), (shared.more[70], ACME), (shared.last, GLOBEX)):
        receipts = shared.reader.receipts(request_id)
        assert [receipt.type for receipt in receipts] == ["request.received", "request.completed"]
        for numbered in receipts:
            receipt = numbered.receipt
            proof = shared.reader.inclusion(tenant, receipt.writer, receipt.writer_seq)
            assert (proof.log, proof.leaf_index) == (receipt.origin, numbered.leaf_index)
            point = open_checkpoint(proof.signed.note, receipt.origin, [shared.keyring.verifier(receipt.origin)])
            hashed = bytes.fromhex(receipt.leaf_hash)
            check_inclusion(hashed, proof.leaf_index, point.size, proof.hashes, point.root)
            with pytest.raises(ProofError):
                check_inclusion(bytes(32), proof.leaf_index, point.size, proof.hashes, point.root)


def test_every_leaf_of_a_log_with_a_full_tile_has_a_proof(reader: AuditReader) -> None:
    point = reader.checkpoint(ACME).checkpoint
    assert point.size > 256
    for index in range(point.size):
        proof = reader.inclusion_at(ACME, index)
        check_inclusion(proof.leaf_hash, index, point.size, proof.hashes, point.root)
    with pytest.raises(NotSignedYet):
        reader.inclusion_at(ACME, point.size)
    with pytest.raises(NotFound):
        reader.inclusion_at(ACME, -1)


def test_the_log_extends_each_checkpoint_it_ever_signed(shared: Story) -> None:
    with Tamper(shared.ledger.path) as tamper:
        log = shared.reader.checkpoint(ACME).checkpoint.origin
        rows = tamper.connection.execute("SELECT tree_size, root FROM checkpoint WHERE log = ?", (log,)).fetchall()
    newest = shared.reader.checkpoint(ACME).checkpoint
    for size, root in rows:
        proof = shared.reader.consistency(ACME, size, newest.size)
        check_consistency(size, root, newest.size, newest.root, proof.hashes)
        old = shared.reader.inclusion_at(ACME, 0, size)
        check_inclusion(old.leaf_hash, 0, size, old.hashes, root)


def test_a_proof_that_cannot_be_is_refused_by_name(reader: AuditReader) -> None:
    size = reader.checkpoint(ACME).checkpoint.size
    for old, new in ((0, size), (-1, size), (size, size - 1)):
        with pytest.raises(OutOfRange):
            reader.consistency(ACME, old, new)
    refused: list[Any] = [
        lambda: reader.consistency(ACME, 1, size + 1),
        lambda: reader.consistency("unheard-of", 1, 2),
        lambda: reader.checkpoint("unheard-of"),
        lambda: reader.inclusion("unheard-of", "w", 0),
        lambda: reader.inclusion(ACME, "w", 0),
        lambda: reader.inclusion_at(ACME, 0, size + 1000),
    ]
    for ask in refused:
        with pytest.raises(NotFound):
            ask()


def test_a_leaf_of_another_tenant_has_no_proof_in_this_log(shared: Story) -> None:
    receipt = shared.reader.receipts(shared.last)[0].receipt
    with pytest.raises(ReadError):
        shared.reader.inclusion(ACME, receipt.writer, receipt.writer_seq + 10_000)
