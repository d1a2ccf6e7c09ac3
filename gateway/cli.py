"""`probity`: the command line. Results go to stdout, progress and diagnostics to stderr.

Exit 0: done; 1: it failed, or the answer is no; 2: usage or settings. Commands that need a model or a server import
it when they run: `probity policy check` starts in a fraction of a second.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from gateway.officer_client import OfficerClient, OfficerRefused, answers
from gateway.settings import Settings, SettingsError, load_settings

FAILED, USAGE = 1, 2
CREDENTIAL_VARIABLE = "PROBITY_TOKEN"  # a credential for `audit` and `replay`; not a setting

_TTL = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

app = typer.Typer(
    name="probity",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run a language model for people who must be able to prove what it said.",
)
audit_app = typer.Typer(no_args_is_help=True, help="Search, show and verify what is on record.")
db_app = typer.Typer(no_args_is_help=True, help="The database.")
policy_app = typer.Typer(no_args_is_help=True, help="Policy documents.")
model_app = typer.Typer(no_args_is_help=True, help="Models.")
app.add_typer(audit_app, name="audit")
app.add_typer(db_app, name="db")
app.add_typer(policy_app, name="policy")
app.add_typer(model_app, name="model")

Data = Annotated[Path | None, typer.Option(help="Database, keys and ratchet are here.  [default: ./probity-data]")]
Config = Annotated[Path | None, typer.Option(help="Settings, e.g. probity.toml.")]
Url = Annotated[str | None, typer.Option(help="The gateway to ask.  [default: the one of the settings]")]


# --- serving ---


@app.command()
def demo(
    data: Data = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Listen here; 0 takes a free port.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the walk: 0 only if every step held.")] = False,
) -> None:
    """Start the embedded default, walk through it on real requests, and keep serving until Ctrl-C."""
    from gateway.demo.walk import run_demo

    # The embedded default, whatever this directory or environment configure for serving.
    with _start_refusals():
        held = run_demo(_read_settings(None, {}, data, {"server.port": port}), once=once)
    if not held:
        raise typer.Exit(FAILED)


@app.command()
def serve(
    config: Config = None,
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="Listen on this address.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Listen on this port.")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, which drain."""
    from gateway.app import create_app, server
    from gateway.diagnostics import install_diagnostics

    settings = _settings(config, data, {"server.host": host, "server.port": port})
    install_diagnostics()
    with _start_refusals():
        gateway = create_app(settings)
        _say(f"serving on {settings.server.host}:{settings.server.port}, data in `{settings.data_dir}`")
        running = server(gateway)
        with _ending_well():
            running.run_alone()
    if not running.started:
        _fail("the server did not start; is the port in use?")


@contextmanager
def _ending_well() -> Iterator[None]:
    """Exit 0 on SIGTERM and Ctrl-C. The server raises the signal again once it has drained and closed the log."""

    def end(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def token(
    tenant: Annotated[str, typer.Option(help="The tenant it speaks for; `*` for the platform.")],
    role: Annotated[list[str], typer.Option(help="Repeat for several.")],
    subject: Annotated[str, typer.Option(help="Whose it is.")] = "someone@development.invalid",
    client: Annotated[str | None, typer.Option(help="The application.")] = None,
    purpose: Annotated[str | None, typer.Option(help="What it is used for.")] = None,
    ttl: Annotated[str, typer.Option(help="How long it is good for: 90s, 30m, 1h, 7d.")] = "1h",
    data: Data = None,
) -> None:
    """Print a credential of the development issuer, and nothing else."""
    settings = _settings(None, data, {})
    if not settings.trusts_development_issuer:
        _fail("other issuers are configured: credentials come from them")
    print(_issue(settings, tenant=tenant, roles=role, subject=subject, client=client, purpose=purpose, ttl_s=_ttl(ttl)))


def _issue(settings: Settings, **claims: Any) -> str:
    from gateway.auth.claims import ClaimRefused
    from gateway.auth.development import DevelopmentIssuer, DevelopmentKeyUnsafe

    try:
        return DevelopmentIssuer.open(settings.data_dir, time.time).issue(**claims)
    except (ClaimRefused, ValueError) as error:
        _fail(str(error), USAGE)
    except (DevelopmentKeyUnsafe, OSError) as error:
        _fail(str(error))


def _ttl(text: str) -> int:
    match = _TTL.fullmatch(text)
    if match is None:
        _fail("`--ttl` is a number with s, m, h or d, such as 1h", USAGE)
    return int(match.group(1)) * _SECONDS[match.group(2)]


@db_app.command()
def upgrade(
    database_url: Annotated[str | None, typer.Option(help="The database.  [default: the one of the settings]")] = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """Bring the database to this version's tables."""
    import migrations

    settings = _settings(config, data, {"database.url": database_url})
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _start_refusals():
        migrations.upgrade(settings.database_url)
    _say("the database is up to date")


# --- the record ---


@audit_app.command()
def search(
    since: Annotated[
        str | None, typer.Option("--from", help="e.g. 2026-11-01T00:00:00Z.  [default: a day ago]")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="[default: now]")] = None,
    tenant: str | None = None,
    subject: Annotated[str | None, typer.Option(help="A person, or the pseudonym of one.")] = None,
    client: str | None = None,
    model: Annotated[str | None, typer.Option(help="Alias or version.")] = None,
    decision: Annotated[str | None, typer.Option(help="allow or deny.")] = None,
    status: str | None = None,
    purpose: str | None = None,
    guardrail: Annotated[str | None, typer.Option(help="One that found something.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 100,
    after: Annotated[str | None, typer.Option(help="`after` of the slice before.")] = None,
    url: Url = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """List requests, newest first: a JSON object a line. The look is on record."""
    now = datetime.now(UTC)
    filters = {
        "from": since or _time(now - timedelta(days=1)),
        "to": until or _time(now + timedelta(seconds=1)),
        "tenant": tenant,
        "subject": subject,
        "client": client,
        "model": model,
        "decision": decision,
        "status": status,
        "purpose": purpose,
        "guardrail": guardrail,
        "limit": str(limit),
        "after": after,
    }
    with _officer(_settings(config, data, {}), url) as officer:
        page = officer.search({name: value for name, value in filters.items() if value is not None})
    for row in page["requests"]:
        print(json.dumps(row, ensure_ascii=False))
    if page["after"] is not None:
        _say(f"there are more: --after {page['after']}")


@audit_app.command()
def show(
    request_id: str,
    reveal: Annotated[bool, typer.Option("--reveal", help="What was said, too; needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; it goes on record.")] = None,
    case: Annotated[str | None, typer.Option(help="The case it belongs to.")] = None,
    url: Url = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """Print the whole story of a request as JSON. The look is on record."""
    if reveal and reason is None:
        _fail("`--reveal` needs `--reason`: it goes on record", USAGE)
    with _officer(_settings(config, data, {}), url) as officer:
        story = officer.show(request_id)
        if reveal and reason is not None:
            story["content"] = officer.reveal(request_id, reason, case)
    print(json.dumps(story, ensure_ascii=False, indent=2))


@audit_app.command()
def verify(
    trust: Annotated[Path | None, typer.Option(help="Whose signatures to believe.  [default: DATA/trust]")] = None,
    checkpoint: Annotated[list[Path] | None, typer.Option(help="A checkpoint you kept; repeat for several.")] = None,
    database_url: Annotated[str | None, typer.Option(help="The database.  [default: the one of the settings]")] = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """Recompute the log from its rows to its signed roots; also `python -m audit.verify`, which needs only audit/."""
    from audit.verify import main as verify_main

    settings = _settings(config, data, {"database.url": database_url})
    ratchet = settings.data_dir / "ratchet"
    held = [*(checkpoint or []), *([ratchet] if ratchet.exists() else [])]
    arguments = [settings.database_url, "--trust", str(trust or settings.data_dir / "trust")]
    raise typer.Exit(verify_main([*arguments, *(part for path in held for part in ("--checkpoint", str(path)))]))


@app.command()
def replay(
    request_id: str,
    mode: Annotated[str, typer.Option(help="regenerate, or forced: in one pass.")] = "regenerate",
    url: Url = None,
    config: Config = None,
    data: Data = None,
) -> None:
    """Have a recorded answer come out again: exit 0 if it is identical, or consistent under another numeric policy."""
    if mode not in ("regenerate", "forced"):
        _fail("`--mode` is `regenerate` or `forced`", USAGE)
    with _officer(_settings(config, data, {}), url) as officer:
        outcome = officer.replay(request_id, mode)
    print(json.dumps(outcome, indent=2))
    if outcome["outcome"] == "different":
        raise typer.Exit(FAILED)


@contextmanager
def _officer(settings: Settings, url: str | None) -> Iterator[OfficerClient]:
    """Yield a client of the running gateway; where none runs on this machine, of one that runs for as long."""
    try:
        with _gateway(settings, url) as at:
            client = OfficerClient(at, _credential(settings))
            try:
                yield client
            finally:
                client.close()
    except OfficerRefused as refused:
        _fail(str(refused))


@contextmanager
def _gateway(settings: Settings, url: str | None) -> Iterator[str]:
    configured = f"http://{settings.server.host}:{settings.server.port}"
    if url is not None or answers(configured):
        yield url or configured
        return
    from gateway.app import create_app
    from gateway.background import BackgroundServer

    _say(f"no gateway answers at {configured}; opening the log here")
    private = replace(settings, server=replace(settings.server, host="127.0.0.1", port=0))
    with _start_refusals(), BackgroundServer(create_app(private)) as own:
        yield own


def _credential(settings: Settings) -> str:
    """Return the officer's credential: the variable's, or one of the development issuer where that is trusted."""
    given = os.environ.get(CREDENTIAL_VARIABLE)
    if given:
        return given
    if not settings.trusts_development_issuer:
        _fail(f"set `{CREDENTIAL_VARIABLE}` to a credential with the role `auditor`")
    subject = f"{getpass.getuser()}@command-line.invalid"
    return _issue(settings, tenant="*", roles=["auditor"], subject=subject, ttl_s=600)


# --- policies and models ---


@policy_app.command()
def check(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    floor: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The organisation's floor.")] = None,
    explain: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A request as JSON: print its decision.")
    ] = None,
) -> None:
    """Validate a policy document and print the digest under which it would hold."""
    from gateway.policy_check import CheckRefused, check_policy, explain_request

    try:
        effective, warnings = check_policy(
            file.read_text(encoding="utf-8"), None if floor is None else floor.read_text(encoding="utf-8")
        )
        for warning in warnings:
            _say(f"warning: {warning}")
        if explain is None:
            print(effective.digest)
        else:
            print(json.dumps(explain_request(effective, explain.read_text(encoding="utf-8")), indent=2))
    except CheckRefused as refused:
        for finding in refused.findings:
            _say(finding)
        raise typer.Exit(FAILED) from None
    except UnicodeDecodeError:
        _fail("a file is not UTF-8")


@model_app.command("digest")
def model_digest(
    path: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="In the Hugging Face layout.")],
    adapter: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A LoRA adapter of it, in PEFT's layout.")
    ] = None,
) -> None:
    """Print the version digest under which a policy approves this model; what it is made of goes to stderr."""
    from engine.adapters import adapter_version
    from engine.config import EngineStartError
    from engine.weights import digest_directory

    try:
        version = digest_directory(path)
        if adapter is not None:
            version = adapter_version(version, adapter.name, adapter)
    except EngineStartError as refused:
        _fail(str(refused))
    except OSError as error:
        _fail(f"`{error.filename}`: {error.strerror}")
    for name in ("weights", "config", "tokenizer", "template"):
        _say(f"{name}: {getattr(version, name)}")
    if version.adapter is not None:
        _say(f"adapter: {version.adapter.digest}")
    print(version.digest)


# --- plumbing ---


def _settings(config: Path | None, data: Path | None, overrides: Mapping[str, object]) -> Settings:
    environment = {name: value for name, value in os.environ.items() if name != CREDENTIAL_VARIABLE}
    if config is None and Path("probity.toml").exists():
        config = Path("probity.toml")
    return _read_settings(config, environment, data, overrides)


def _read_settings(
    config: Path | None, environment: Mapping[str, str], data: Path | None, overrides: Mapping[str, object]
) -> Settings:
    try:
        return load_settings(config, environment, {"data_dir": None if data is None else str(data), **overrides})
    except SettingsError as error:
        for problem in error.problems:
            _say(str(problem))
        raise typer.Exit(USAGE) from None


@contextmanager
def _start_refusals() -> Iterator[None]:
    """A start-up that cannot keep a promise ends here, with its reason and without a traceback."""
    from gateway.start_refusal import START_REFUSALS, reason

    try:
        yield
    except START_REFUSALS as refused:
        _fail(f"refused to start: {reason(refused)}")


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _fail(text: str, code: int = FAILED) -> NoReturn:
    _say(text)
    raise typer.Exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
