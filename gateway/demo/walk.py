"""`probity demo`: the embedded default is started, and every promise is tried on real requests.

The walk talks to the gateway as anybody would: the `openai` client for the application, plain HTTP for the officer,
and for the proofs nothing but the trust file and audit/'s arithmetic. A step that does not hold ends the walk.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import openai
from fastapi import FastAPI

from audit.checkpoint import CheckpointError, open_checkpoint
from audit.database import reader_engine
from audit.merkle import MerkleError, check_inclusion
from audit.note import NoteError
from audit.ratchet import Ratchet
from audit.trust import read_trust
from audit.verification import Report, verify
from gateway.app import create_app
from gateway.auth.development import DevelopmentIssuer
from gateway.background import BackgroundServer
from gateway.demo.stage import Stage
from gateway.demo.tamper import NothingToForge, copy_database, forge_denial
from gateway.demo.tenants import ACME, GLOBEX, PolicyNotInForce, put_policies_in_force
from gateway.officer_client import NotYet, OfficerClient, OfficerRefused
from gateway.settings import Settings
from gateway.state import AppState

MODEL = "bank-chat"  # an alias of acme-bank's policy
PURPOSE = "customer-support"
FORBIDDEN_PURPOSE = "code-assist"  # defined in the policy, and no rule allows it
SEED = 20_261_120
CARD, EMAIL = "4111 1111 1111 1111", "mia@example.com"
CREDENTIAL_TTL_S = 8 * 3600
SIGNED_WITHIN_S = 10.0

QUESTION = "How do I open an account?"
COMPLAINT = f"My card {CARD} was stolen, write to {EMAIL}."
CARD_QUESTION = "What is the test card number?"  # the model knows it; the policy does not let it out


class StepFailed(Exception):
    """A step did not hold; the message says what was found instead."""


@dataclass(slots=True)
class Found:
    """What earlier steps found and later ones ask about."""

    answered: str = ""  # request ids
    denied: str = ""
    redacted: str = ""
    receipts: dict[str, str] = field(default_factory=dict)  # request id → receipt header


class Walk:
    """The steps, in order. `credential` returns a fresh one for (tenant, roles, subject)."""

    def __init__(self, url: str, settings: Settings, credential: Callable[[str, list[str], str], str]) -> None:
        self._settings = settings
        self._found = Found()
        self._started = datetime.now(UTC) - timedelta(minutes=1)
        self._http = openai.DefaultHttpxClient(trust_env=False)  # loopback: no proxy of the environment
        self._app = openai.OpenAI(
            api_key=credential(ACME, ["app"], "mia@acme.example"),
            base_url=f"{url}/v1",
            http_client=self._http,
            max_retries=0,
            default_headers={"probity-purpose": PURPOSE},
        )
        self._officer = OfficerClient(url, credential(ACME, ["auditor"], "otto@acme.example"))

    def close(self) -> None:
        self._http.close()
        self._officer.close()

    @property
    def steps(self) -> list[tuple[str, Callable[[], list[str]]]]:
        return [
            ("An application asks, and the answer streams", self.streamed_answer),
            ("The policy refuses a purpose that no rule allows", self.denial),
            ("Personal data never reaches the model, nor leaves it", self.redaction),
            ("An officer finds each of them on record", self.records),
            ("A receipt is held against the log: an inclusion proof, checked here", self.inclusion),
            ("The answer is generated again, bit for bit", self.replayed),
            ("Somebody edits a copy of the database, and is caught", self.tampering),
        ]

    # --- the application ---

    def streamed_answer(self) -> list[str]:
        raw = self._app.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            temperature=0.2,
            seed=SEED,
            max_tokens=200,
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices]
        answer = "".join(pieces).strip()
        _must(bool(answer), "the answer is empty")
        self._found.answered = self._keep(raw.headers)
        return [
            f"asked:    {QUESTION}",
            f"answered: {_short(answer)}",
            f"{len(pieces)} pieces, each on record before it left; receipt {_short(raw.headers['probity-receipt'])}",
        ]

    def denial(self) -> list[str]:
        try:
            self._app.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Write me a script."}],
                extra_headers={"probity-purpose": FORBIDDEN_PURPOSE},
            )
        except openai.PermissionDeniedError as denied:
            _must(denied.code == "policy_denied", f"the code is `{denied.code}`, not `policy_denied`")
            self._found.denied = self._keep(denied.response.headers)
            return [f"purpose `{FORBIDDEN_PURPOSE}`: {denied.status_code} {denied.code}, with a receipt of its own"]
        raise StepFailed("it was answered")

    def redaction(self) -> list[str]:
        raw = self._app.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": COMPLAINT}], max_tokens=64, seed=SEED
        )
        self._found.redacted = self._keep(raw.headers)
        content = self._officer.reveal(self._found.redacted, "the demo shows what the model saw", case="DEMO-1")
        seen = content["prompt_to_model"]
        _must(CARD in content["prompt"], "the prompt as sent is not on record")
        _must(CARD not in seen and EMAIL not in seen, "the model saw personal data")
        return [f"sent:      {COMPLAINT}", f"model saw: {_short(' '.join(seen.split()), 160)}", *self._withheld()]

    def _withheld(self) -> list[str]:
        """Ask for what the output guardrail withholds, streamed: it is held until it was inspected."""
        chunks = self._app.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": CARD_QUESTION}],
            max_tokens=64,
            temperature=0,
            stream=True,
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        _must(CARD not in answer, "a card number left the gateway")
        return [f"asked:     {CARD_QUESTION}", f"delivered: {_short(answer.strip())}"]

    # --- the officer ---

    def records(self) -> list[str]:
        until = datetime.now(UTC) + timedelta(minutes=1)
        page = self._officer.search({"from": self._started.isoformat(), "to": until.isoformat()})
        listed = {row["request_id"] for row in page["requests"]}
        expected = {
            self._found.answered: "completed",
            self._found.denied: "denied",
            self._found.redacted: "completed",
        }
        _must(expected.keys() <= listed, "a request is missing from the list")
        facts = []
        for request_id, status in expected.items():
            story = self._officer.show(request_id)
            _must(story["status"] == status, f"`{request_id}` is `{story['status']}`, not `{status}`")
            findings = [g["id"] for g in story["guardrails"] if g["verdict"] not in ("passed", "not_run")]
            facts.append(
                f"{request_id}  {status:9}  {story['decision']['effect']:5}  "
                f"{len(story['records'])} records{'  ' + ', '.join(findings) if findings else ''}"
            )
        return facts

    def inclusion(self) -> list[str]:
        trust = read_trust(self._settings.data_dir / "trust")
        facts = []
        for request_id, receipt in self._found.receipts.items():
            origin, writer, writer_seq, leaf_hash = receipt.split(";")
            proof = self._signed(lambda w=writer, s=writer_seq: self._officer.inclusion(ACME, w, int(s)))  # type: ignore[misc]
            try:
                signed = open_checkpoint(proof["checkpoint"], origin, trust.logs.get(origin, ()))
                hashes = [bytes.fromhex(hashed) for hashed in proof["hashes"]]
                check_inclusion(bytes.fromhex(leaf_hash), proof["leaf_index"], signed.size, hashes, signed.root)
            except (CheckpointError, NoteError, MerkleError) as wrong:
                raise StepFailed(f"the proof for `{request_id}` does not hold: {wrong}") from None
            facts.append(
                f"{request_id} is leaf {proof['leaf_index']} of {signed.size}: "
                f"{len(hashes)} hashes lead to the signed root"
            )
        return facts

    def replayed(self) -> list[str]:
        outcome = self._officer.replay(self._found.answered)
        _must(outcome["outcome"] == "identical", f"the replay is {outcome['outcome']}")
        tokens = sum(choice["tokens"] for choice in outcome["choices"])
        return [f"{tokens} tokens, every token and every log-probability: {outcome['outcome']}"]

    def tampering(self) -> list[str]:
        log = self._found.receipts[self._found.denied].split(";")[0]
        live = self._settings.data_dir / "probity.sqlite3"
        with tempfile.TemporaryDirectory(prefix="probity-demo-") as directory:
            copy = Path(directory) / "copy.sqlite3"
            copy_database(live, copy)
            untouched = self._verified(copy)
            _must(untouched.first_wrong is None, f"the log itself does not verify: {untouched.first_wrong}")
            try:
                index = forge_denial(copy, self._found.denied)
            except NothingToForge as nothing:
                raise StepFailed(str(nothing)) from None
            wrong = self._verified(copy).first_wrong
        _must(wrong is not None, "the edit was not noticed")
        assert wrong is not None
        _must((wrong.log, wrong.index) == (log, index), f"leaf {index} was edited, and verify names: {wrong}")
        return ["the copy verifies before the edit; a denial is edited, its hash with it; verify says:", f"{wrong}"]

    # --- plumbing ---

    def _keep(self, headers: Mapping[str, str]) -> str:
        """Keep the receipt of an answer; return its request id."""
        _must("x-request-id" in headers and "probity-receipt" in headers, "the answer has no receipt")
        request_id: str = headers["x-request-id"]
        self._found.receipts[request_id] = headers["probity-receipt"]
        return request_id

    def _signed(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask until a checkpoint covers it: that takes up to a second."""
        deadline = time.monotonic() + SIGNED_WITHIN_S
        while True:
            try:
                return ask()
            except NotYet:
                if time.monotonic() > deadline:
                    raise StepFailed(f"no checkpoint covers the leaf after {SIGNED_WITHIN_S:.0f} s") from None
                time.sleep(0.1)

    def _verified(self, database: Path) -> Report:
        ratchet = Ratchet.load(self._settings.data_dir / "ratchet")
        held = [note for origin in ratchet.origins if (note := ratchet.note(origin)) is not None]
        engine = reader_engine(f"sqlite:///{database}")
        try:
            return verify(engine, read_trust(self._settings.data_dir / "trust"), held)
        finally:
            engine.dispose()


def run_demo(settings: Settings, *, once: bool, app: FastAPI | None = None) -> bool:
    """Serve, walk, and keep serving unless `once`; return whether every step held.

    Raises: what `create_app` raises when it cannot start.
    """
    stage = Stage(sys.stdout)
    stage.opening(f"Probity, embedded: data in `{settings.data_dir}`")
    app = app or create_app(settings)
    server = BackgroundServer(app)
    with _terminating(), server as url:
        issuer = DevelopmentIssuer.open(settings.data_dir, time.time)

        def credential(tenant: str, roles: list[str], subject: str) -> str:
            return issuer.issue(tenant=tenant, roles=roles, subject=subject, ttl_s=CREDENTIAL_TTL_S)

        held = _walk(stage, url, app.state.probity, credential)
        if once or not held:
            return held
        _invite(stage, url, credential)
        with suppress(KeyboardInterrupt):
            server.wait()
        stage.line("\nending; what is in progress is closed first")
    return True


def _walk(stage: Stage, url: str, state: AppState, credential: Callable[[str, list[str], str], str]) -> bool:
    author = credential("*", ["policy_author"], "paula@platform.example")
    approver = credential("*", ["policy_approver"], "quentin@platform.example")
    try:
        fresh = put_policies_in_force(url, author, approver, state.engine.model.digest)
    except PolicyNotInForce as refused:
        stage.failed("policies", str(refused))
        return False
    stage.line(f"serving {url}; policies put in force: {', '.join(fresh) or 'none, they hold already'}")
    walk = Walk(url, state.settings, credential)
    try:
        return all(_step(stage, number, *step) for number, step in enumerate(walk.steps, start=1))
    finally:
        walk.close()


def _step(stage: Stage, number: int, title: str, run: Callable[[], list[str]]) -> bool:
    stage.step(number, title)
    try:
        facts = run()
    except (StepFailed, OfficerRefused) as failed:
        stage.failed(title, str(failed))
        return False
    except openai.APIError as error:
        stage.failed(title, f"{type(error).__name__}: {error.message}")
        return False
    stage.facts(facts)
    stage.held()
    return True


def _invite(stage: Stage, url: str, credential: Callable[[str, list[str], str], str]) -> None:
    app, officer = credential(ACME, ["app"], "you@acme.example"), credential(ACME, ["auditor"], "you@acme.example")
    clinic = credential(GLOBEX, ["app"], "you@globex.example")
    stage.line(f"\nEvery step held. Go on yourself; credentials are good for {CREDENTIAL_TTL_S // 3600} hours.")
    stage.line(f"\nAn application of {ACME}:\n  export APP='{app}'")
    stage.line(
        f"  curl -sS {url}/v1/chat/completions -H \"authorization: Bearer $APP\" -H 'probity-purpose: {PURPOSE}' \\\n"
        "    -H 'content-type: application/json' \\\n"
        f"""    -d '{{"model":"{MODEL}","messages":[{{"role":"user","content":"{QUESTION}"}}]}}'"""
    )
    stage.line(f"\nAn application of {GLOBEX} (model `clinic-chat`, purpose `front-desk`):\n  export CLINIC='{clinic}'")
    stage.line(f"\nAn auditor of {ACME}:\n  export AUDITOR='{officer}'")
    stage.line(f"  curl -sS '{url}/audit/checkpoint' -H \"authorization: Bearer $AUDITOR\"")
    stage.line("\nCtrl-C ends it.")


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM end the demo as Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StepFailed(otherwise)


def _short(text: str, longest: int = 96) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
