"""`probity`, as its users type it: results on stdout, everything else on stderr, and an exit status that means it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from audit.canonical import leaf_hash
from gateway.auth.claims import Expectation
from gateway.auth.development import AUDIENCE, ISSUER, DevelopmentIssuer
from gateway.cli import app
from policies import bundles
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, leaves
from tests.support.scripted_engine import ScriptedEngine

VERSION = "sha256:" + "ab" * 32
SECRET = "what nobody should see"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where no probity.toml lies and no setting is in the environment."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for name in ("PROBITY_TOKEN", "PROBITY_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("cli"), ScriptedEngine(lambda prompt: "an answer")) as running:
        yield running


@pytest.fixture(scope="module")
def request_id(gateway: RunningGateway) -> str:
    return Hand(gateway, "app").ask(SECRET)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def officer(gateway: RunningGateway, *arguments: str) -> Result:
    return run(*arguments, "--url", gateway.url, "--data", str(gateway.rooms.settings.data_dir))


# --- help and usage ---


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "serve",
        "token",
        "db upgrade",
        "audit search",
        "audit show",
        "audit verify",
        "replay",
        "policy check",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_what_is_not_a_command_is_a_usage_error() -> None:
    assert run("bake").exit_code == 2
    assert run("token").exit_code == 2
    assert run("replay").exit_code == 2


def test_a_bad_setting_is_named_and_its_value_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBITY_SERVER_PORT", SECRET)
    result = run("token", "--tenant", "acme-bank", "--role", "app")
    assert result.exit_code == 2
    assert "server.port" in result.stderr
    assert SECRET not in result.output


# --- token ---


def test_a_token_stands_alone_on_stdout_and_is_good(tmp_path: Path) -> None:
    result = run("token", "--tenant", "acme-bank", "--role", "app", "--role", "nurse", "--data", str(tmp_path))
    assert result.exit_code == 0
    assert result.stderr == ""
    credential = result.stdout.strip()
    assert result.stdout == f"{credential}\n"
    assert credential.count(".") == 2
    assert (tmp_path / "development-issuer.pem").stat().st_mode & 0o777 == 0o600
    assert DevelopmentIssuer.open(tmp_path, lambda: 0.0).expected == Expectation(ISSUER, AUDIENCE)


@pytest.mark.parametrize("ttl", ["1", "h", "0h", "-1h", "1w", "31d", "99999999h", ""])
def test_a_time_to_live_that_is_none_is_a_usage_error(tmp_path: Path, ttl: str) -> None:
    result = run("token", "--tenant", "acme-bank", "--role", "app", "--ttl", ttl, "--data", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_claim_that_the_verifier_would_refuse_is_a_usage_error(tmp_path: Path) -> None:
    result = run("token", "--tenant", "Not A Tenant", "--role", "app", "--data", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tenant" in result.stderr


# --- the record ---


def test_search_prints_a_line_a_request_and_is_on_record(gateway: RunningGateway, request_id: str) -> None:
    result = officer(gateway, "audit", "search")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert request_id in [row["request_id"] for row in rows]
    assert SECRET not in result.output
    assert leaves(gateway, type="audit.read")[-1].body["view"] == "requests"


def test_a_refused_search_fails_and_says_why(gateway: RunningGateway) -> None:
    result = officer(gateway, "audit", "search", "--status", "eaten")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "status" in result.stderr


def test_show_tells_the_story_and_reveals_only_with_a_reason(gateway: RunningGateway, request_id: str) -> None:
    story = officer(gateway, "audit", "show", request_id)
    assert json.loads(story.stdout)["status"] == "completed"
    assert SECRET not in story.stdout
    assert officer(gateway, "audit", "show", request_id, "--reveal").exit_code == 2
    revealed = officer(gateway, "audit", "show", request_id, "--reveal", "--reason", "an investigation")
    assert SECRET in json.loads(revealed.stdout)["content"]["prompt"]


@pytest.mark.parametrize("wanted", ["0193f0c2-0000-7000-8000-000000000000", "../../v1/models", "", "ä"])
def test_what_is_no_request_of_the_log_fails(gateway: RunningGateway, wanted: str) -> None:
    assert officer(gateway, "audit", "show", wanted).exit_code == 1
    assert officer(gateway, "replay", wanted).exit_code == 1


def test_a_replay_exits_zero_when_it_is_identical(gateway: RunningGateway, request_id: str) -> None:
    assert officer(gateway, "replay", request_id, "--mode", "forced").exit_code == 0
    assert officer(gateway, "replay", request_id, "--mode", "guess").exit_code == 2
    result = officer(gateway, "replay", request_id)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["outcome"] == "identical"


def test_a_credential_of_the_environment_goes_before_the_issuer_s(
    gateway: RunningGateway, request_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBITY_TOKEN", gateway.credential("app"))
    result = officer(gateway, "audit", "show", request_id)
    assert result.exit_code == 1
    assert "403" in result.stderr


def test_where_no_gateway_answers_the_command_says_so(tmp_path: Path) -> None:
    result = run("audit", "search", "--url", "http://127.0.0.1:9", "--data", str(tmp_path))
    assert result.exit_code == 1
    assert "probity serve" in result.stderr


def test_verify_holds_on_the_log_and_names_the_edited_leaf(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_gateway(data, ScriptedEngine(lambda prompt: "an answer")) as running:
        request_id = Hand(running, "app").ask("to be edited")
    good = run("audit", "verify", "--data", str(data))
    assert good.exit_code == 0, good.output
    assert "verified" in good.stdout
    connection = sqlite3.connect(data / "probity.sqlite3")
    for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f'DROP TRIGGER "{trigger}"')
    (stored,) = connection.execute(
        "SELECT bytes FROM leaf WHERE request_id = ? AND type = 'request.received'", (request_id,)
    ).fetchone()
    forged = stored.replace(b'"effect":"allow"', b'"effect":"alloy"')
    connection.execute("UPDATE leaf SET bytes = ?, leaf_hash = ? WHERE bytes = ?", (forged, leaf_hash(forged), stored))
    connection.commit()
    connection.close()
    wrong = run("audit", "verify", "--data", str(data))
    assert wrong.exit_code == 1
    assert "WRONG" in wrong.stdout
    assert "leaf" in wrong.stdout


def test_verify_of_nothing_could_not_be_tried(tmp_path: Path) -> None:
    assert run("audit", "verify", "--data", str(tmp_path)).exit_code == 2


# --- database and policies ---


def test_upgrade_makes_the_tables_and_may_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        result = run("db", "upgrade", "--data", str(tmp_path / "data"))
        assert (result.exit_code, result.stdout) == (0, "")
    connection = sqlite3.connect(tmp_path / "data" / "probity.sqlite3")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    assert {"leaf", "policy_version"} <= tables


def bundle(tmp_path: Path, name: str, **changes: str) -> str:
    text = bundles.render(name, VERSION)
    for old, new in changes.items():
        text = text.replace(old, new)
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["acme-bank", "globex-health"])
def test_a_bundled_policy_checks_under_the_bundled_floor(tmp_path: Path, name: str) -> None:
    result = run("policy", "check", bundle(tmp_path, name), "--floor", bundle(tmp_path, "org-floor"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("sha256:")
    without = run("policy", "check", bundle(tmp_path, name))
    assert without.exit_code == 0
    assert without.stdout != result.stdout


def test_a_wrong_policy_is_refused_with_its_places(tmp_path: Path) -> None:
    path = bundle(tmp_path, "acme-bank", **{"default: deny": "default: allow", "name: acme-bank-prod": "nam: x"})
    result = run("policy", "check", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "default:" in result.stderr
    assert "nam:" in result.stderr


@pytest.mark.parametrize(
    ("purpose", "effect"), [("customer-support", "allow"), ("code-assist", "deny"), ("never-heard-of", "deny")]
)
def test_a_decision_is_explained(tmp_path: Path, purpose: str, effect: str) -> None:
    asked = tmp_path / "request.json"
    asked.write_text(json.dumps({"roles": ["app"], "model": "bank-chat", "purpose": purpose}))
    result = run("policy", "check", bundle(tmp_path, "acme-bank"), "--explain", str(asked))
    decision = json.loads(result.stdout)
    assert decision["effect"] == effect
    assert decision["reasons"]
    assert (decision["obligations"] is not None) is (effect == "allow")


def test_a_request_that_is_none_is_not_explained(tmp_path: Path) -> None:
    asked = tmp_path / "request.json"
    for text in ("{", "[]", '{"roles": ["app"]}', '{"roles": ["app"], "model": "m", "surprise": 1}'):
        asked.write_text(text)
        assert run("policy", "check", bundle(tmp_path, "acme-bank"), "--explain", str(asked)).exit_code == 1
