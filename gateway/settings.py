"""Every setting, in one place: `probity.toml`, then `PROBITY_*` environment, then the command line; the last wins.

    data_dir = "probity-data"
    [server]
    port = 8080
    [[issuers]]
    iss = "https://id.acme.example"
    jwks_url = "https://id.acme.example/.well-known/jwks.json"
    algorithms = ["RS256"]

The dataclasses are the reference: names, defaults, ranges and explanations stand on the fields, the README's table is
made of them, and the environment's names too (`server.port` is `PROBITY_SERVER_PORT`). A value of the wrong kind, out
of range or under an unknown name is refused, and all of them are named at once. Values are never repeated in messages:
some of them are secrets.
"""

# ruff: noqa: RUF009 - `setting` makes a dataclass field, whose default is immutable

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Final

from gateway.auth.claims import PLATFORM, TENANT
from gateway.auth.jwks import ALGORITHMS
from gateway.setting import (
    DATABASE_URL,
    PRINTABLE,
    URL,
    Kind,
    decimal_kind,
    integer_kind,
    is_network,
    list_kind,
    path_kind,
    setting,
    text_kind,
)
from gateway.strict_json import MalformedJson, parse_json

ENVIRONMENT_PREFIX: Final = "PROBITY_"
MAX_ISSUERS = 16


@dataclass(frozen=True, slots=True)
class SettingProblem:
    path: str  # e.g. server.port
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"`{self.path}`: {self.what}; {self.remedy}"


class SettingsError(Exception):
    """The settings cannot be used. `problems` names every bad one."""

    def __init__(self, problems: list[SettingProblem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


_ORIGIN = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?(?:/[a-z0-9][a-z0-9.-]{0,62})*")
_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_WEIGHT = re.compile(r"[^=\s]{1,128}=(?:[1-9][0-9]{0,2}|1000)")
_ADAPTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}=[^\0]+", re.DOTALL)
_KERNELS = ("compiled", "library")
_RUNS_IN = ("thread", "process")
_KV_CACHE_DTYPES = ("bfloat16", "fp8_e4m3")
_DEVICE = re.compile(r"cpu|cuda(?::(?:0|[1-9][0-9]{0,2}))?")
_HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")


# --- the settings ---


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the gateway listens, and the bounds of what it reads."""

    host: str = setting(
        "127.0.0.1", text_kind("an address or a host name", lambda t: bool(_HOST.fullmatch(t))), "listen here"
    )
    port: int = setting(8080, integer_kind(0, 65_535), "listen on this port; 0 takes a free one")
    max_connections: int = setting(
        2_048, integer_kind(1, 1_048_576), "open connections; one more is answered 503 `overloaded` and closed"
    )
    max_body_bytes: int = setting(
        4_194_304, integer_kind(1024, 268_435_456, "bytes"), "a larger request body is answered 413"
    )
    max_header_bytes: int = setting(
        32_768, integer_kind(4096, 1_048_576, "bytes"), "larger request headers are answered 431"
    )
    max_bodies_mib: int = setting(
        256,
        integer_kind(1, 1_048_576, "MiB"),
        "bodies of all requests in progress, of one tenant three quarters; more are answered 503 `overloaded`",
    )
    head_timeout_s: float = setting(
        10.0, decimal_kind(0.1, 600, "s"), "a request's headers must have come by then, or 408 and the end"
    )
    body_timeout_s: float = setting(
        60.0, decimal_kind(0.1, 3600, "s"), "its body must have come by then, from its headers on, or 408"
    )
    trusted_proxies: tuple[str, ...] = setting(
        (),
        list_kind("a list of networks, `10.1.0.0/16`, or addresses", is_network, at_least=0),
        "take a caller's address from the `x-forwarded-for` of these; rules and records go by it, so name no other",
    )
    drain_timeout_s: float = setting(
        30.0, decimal_kind(0, 3600, "s"), "how long requests in progress may take to end after SIGTERM"
    )


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """Where records, policies and keys live."""

    url: str | None = setting(None, DATABASE_URL, "records and policies; without it, SQLite in `data_dir`", secret=True)
    keystore_url: str | None = setting(
        None,
        DATABASE_URL,
        "tenants' keys, apart from what they encrypt; without it, SQLite in `data_dir`",
        secret=True,
    )


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """The log of evidence."""

    origin_prefix: str = setting(
        "probity.local",
        text_kind("a host name, then names after `/`", lambda t: bool(_ORIGIN.fullmatch(t))),
        "the logs are named this, then `/tenant`; it stands in every checkpoint and never changes",
    )
    append_timeout_s: float = setting(
        5.0, decimal_kind(0.05, 60, "s"), "no answer is given when the log has not confirmed by then"
    )
    low_water_mib: int = setting(
        256, integer_kind(1, 1_048_576, "MiB"), "with less free disk than this, nothing new is answered"
    )
    lease_s: float = setting(
        30.0,
        decimal_kind(1, 3600, "s"),
        "PostgreSQL: a gateway silent for so long is held for dead, and the others close its open requests",
    )


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """How gateways on one database keep in step."""

    refresh_s: float = setting(
        0.5, decimal_kind(0.05, 60, "s"), "how often changes that another gateway made are looked for"
    )
    patience_s: float = setting(
        5.0,
        decimal_kind(0.5, 3600, "s"),
        "how long after it the policies in memory hold unconfirmed; then 503 `audit_unavailable`",
    )


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What answers. Which names reach it is a matter of policy."""

    path: Path | None = setting(
        None,
        path_kind("a directory in the Hugging Face layout"),
        "the weights; without it, the bundled demonstration model",
    )
    adapters: tuple[str, ...] = setting(
        (),
        list_kind("a list of `NAME=DIRECTORY`", lambda text: bool(_ADAPTER.fullmatch(text)), at_least=0),
        "LoRA adapters in PEFT's layout, loaded beside the weights; each makes a model version of its own",
    )

    @property
    def adapter_directories(self) -> tuple[tuple[str, Path], ...]:
        stated = (entry.partition("=") for entry in self.adapters)
        return tuple((name, Path(directory)) for name, _, directory in stated)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much the engine takes on."""

    device: str | None = setting(
        None,
        text_kind("`cpu`, `cuda` or `cuda:N`", lambda t: bool(_DEVICE.fullmatch(t))),
        "what computes; without it, `cuda` where torch finds one, else the CPU",
    )
    runs_in: str = setting(
        "process",
        text_kind("`thread` or `process`", _RUNS_IN.__contains__),
        "where the engine steps: a process of its own, or a thread of the gateway's, slower and in less memory",
    )
    threads: int | None = setting(
        None,
        integer_kind(1, 1024),
        "threads of the CPU for tensors; without it, as many as CPUs, one fewer for a small model",
    )
    kernels: str = setting(
        "compiled",
        text_kind("`compiled` or `library`", _KERNELS.__contains__),
        "of a CPU: compiled at the first start where it has AVX512-bf16, and faster; or torch's. Two numeric policies",
    )
    kv_cache_mib: int = setting(256, integer_kind(1, 1_048_576, "MiB"), "memory for keys and values of all sequences")
    kv_cache_dtype: str = setting(
        "bfloat16",
        text_kind("`bfloat16` or `fp8_e4m3`", _KV_CACHE_DTYPES.__contains__),
        "how keys and values are kept; `fp8_e4m3` takes half the memory and rounds them: another numeric policy",
    )
    max_sequences: int = setting(64, integer_kind(1, 4096), "sequences in one step")
    max_tokens_per_step: int = setting(256, integer_kind(16, 131_072, "tokens"), "token budget of one step")
    max_waiting: int = setting(
        256, integer_kind(0, 65_536), "sequences that may wait; more are answered 503 `overloaded`"
    )
    max_per_tenant: int | None = setting(
        None,
        integer_kind(1, 65_536),
        "sequences of one tenant, waiting and running; without it, three quarters of all",
    )
    weights: tuple[str, ...] = setting(
        (),
        list_kind("a list of `TENANT=WEIGHT`, 1 … 1,000", lambda text: bool(_WEIGHT.fullmatch(text)), at_least=0),
        "turns of a tenant for each turn of one that is not named",
    )

    def weight(self, tenant: str) -> int:
        stated = dict(entry.rsplit("=", 1) for entry in self.weights)
        return int(stated.get(tenant, 1))


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Traces; metrics are always on at `/metrics`."""

    otlp_endpoint: str | None = setting(None, URL, "send traces here, OTLP over HTTP; without it, none are made")
    sample_ratio: float = setting(0.01, decimal_kind(0, 1), "share of requests that are traced")
    service_name: str = setting(
        "probity", text_kind("a name", lambda t: bool(_SERVICE.fullmatch(t))), "the service's name in traces"
    )


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Bounds of the whole process; a tenant's are in its policy."""

    max_governed: int = setting(
        256, integer_kind(1, 65_536), "requests in progress; more are answered 503 `overloaded`"
    )
    max_governed_per_tenant: int | None = setting(
        None, integer_kind(1, 65_536), "those of one tenant; without it, three quarters of all"
    )


@dataclass(frozen=True, slots=True)
class IssuerSettings:
    """Who may sign credentials. Without any, the development issuer of `data_dir` is trusted."""

    iss: str | None = setting(
        None,
        text_kind("1 to 512 printable characters", lambda t: bool(PRINTABLE.fullmatch(t))),
        "its name, exactly as in `iss`",
    )
    jwks_url: str | None = setting(None, URL, "where its public keys are fetched; this or `jwks_file`")
    jwks_file: Path | None = setting(None, path_kind("a file"), "where its public keys are read")
    algorithms: tuple[str, ...] = setting(
        ("RS256",), list_kind("a list of `RS256`, `ES256`", ALGORITHMS.__contains__, at_least=1), "what it signs with"
    )
    audience: str = setting(
        "probity",
        text_kind("1 to 512 printable characters", lambda t: bool(PRINTABLE.fullmatch(t))),
        "required in `aud`",
    )
    tenants: tuple[str, ...] = setting(
        (),
        list_kind("a list of tenants", lambda t: t == PLATFORM or bool(TENANT.fullmatch(t)), at_least=0),
        "the tenants it may speak for (`*` for platform-wide credentials); empty: any",
    )
    leeway_s: float = setting(30.0, decimal_kind(0, 60, "s"), "how far its clock and ours may disagree")


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it. Made by `load_settings`, never changed afterwards."""

    data_dir: Path = setting(Path("probity-data"), path_kind("a directory"), "database, keys, journal and ratchet")
    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    audit: AuditSettings = AuditSettings()
    policies: PolicySettings = PolicySettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    limits: LimitSettings = LimitSettings()
    issuers: tuple[IssuerSettings, ...] = ()

    @property
    def database_url(self) -> str:
        return self.database.url or f"sqlite:///{self.data_dir / 'probity.sqlite3'}"

    @property
    def keystore_url(self) -> str:
        return self.database.keystore_url or f"sqlite:///{self.data_dir / 'keystore.sqlite3'}"

    @property
    def trusts_development_issuer(self) -> bool:
        return not self.issuers


# --- reading ---


def load_settings(
    config: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,  # by dotted path, e.g. {"server.port": 0}; None values are skipped
) -> Settings:
    """Return the settings. Raises: SettingsError, naming every problem."""
    reader = _Reader()
    document = reader.read_file(config)
    reader.overlay(document, reader.read_environment(environment))
    reader.overlay(document, {path: value for path, value in (overrides or {}).items() if value is not None})
    settings = reader.build(document)
    if reader.problems:
        raise SettingsError(sorted(set(reader.problems), key=lambda problem: problem.path))
    return settings


class _Reader:
    """Collects problems instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[SettingProblem] = []

    def refuse(self, path: str, what: str, remedy: str) -> None:
        self.problems.append(SettingProblem(path, what, remedy))

    def read_file(self, config: Path | None) -> dict[str, Any]:
        if config is None:
            return {}
        try:
            with config.open("rb") as file:
                return tomllib.load(file)
        except OSError:
            self.refuse(config.name, "the file cannot be read", "check the path and its mode")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            # The parser's message quotes the line, which may hold a password.
            self.refuse(config.name, "the file is not TOML", "check it with a TOML linter")
        return {}

    def read_environment(self, environment: Mapping[str, str]) -> dict[str, object]:
        known = {_environment_name(path): (path, spec) for path, spec in _scalar_fields()}
        values: dict[str, object] = {}
        for name, text in environment.items():
            if name == f"{ENVIRONMENT_PREFIX}ISSUERS":
                values["issuers"] = self._issuers_from(text)
            elif name in known:
                path, spec = known[name]
                try:
                    values[path] = _kind(spec).from_text(text)
                except ValueError as error:
                    self.refuse(path, str(error), f"correct `{name}`")
            elif name.startswith(ENVIRONMENT_PREFIX):
                self.refuse(name, "there is no such setting", "remove it from the environment or correct its name")
        return values

    def _issuers_from(self, text: str) -> object:
        try:
            return parse_json(text.encode("utf-8", "surrogateescape"))
        except MalformedJson as error:
            self.refuse("issuers", f"`PROBITY_ISSUERS` is {error}", "write a JSON list of objects")
            return []

    def overlay(self, document: dict[str, Any], values: Mapping[str, object]) -> None:
        for path, value in values.items():
            section, _, name = path.rpartition(".")
            target = document.setdefault(section, {}) if section else document
            if isinstance(target, dict):
                target[name] = value

    def build(self, document: Mapping[str, Any]) -> Settings:
        sections = {spec.name: _section_type(spec) for spec in fields(Settings) if _is_section(spec)}
        values: dict[str, Any] = self._fields(Settings, document, "", skip=frozenset({*sections, "issuers"}))
        for name, section in sections.items():
            values[name] = self._section(section, document.get(name, {}), name)
        values["issuers"] = self._issuers(document.get("issuers", []))
        return Settings(**values)

    def _section(self, section: Any, document: object, path: str) -> Any:
        if not isinstance(document, dict):
            self.refuse(path, "must be a table", f"write `[{path}]` and its settings below it")
            return section()
        return section(**self._fields(section, document, f"{path}."))

    def _fields(
        self, owner: Any, document: Mapping[str, Any], prefix: str, skip: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        known = {spec.name: spec for spec in fields(owner) if spec.name not in skip}
        values: dict[str, Any] = {}
        for name, value in document.items():
            if name in skip:
                continue
            if name not in known:
                self.refuse(f"{prefix}{name}", "there is no such setting", "remove it or correct its name")
                continue
            try:
                values[name] = _kind(known[name]).read(value)
            except ValueError as error:
                self.refuse(f"{prefix}{name}", str(error), "correct it or leave it out for the default")
        return values

    def _issuers(self, documents: object) -> tuple[IssuerSettings, ...]:
        if not isinstance(documents, list) or len(documents) > MAX_ISSUERS:
            self.refuse("issuers", f"must be a list of at most {MAX_ISSUERS} tables", "write `[[issuers]]` for each")
            return ()
        issuers = tuple(self._issuer(document, f"issuers[{index}]") for index, document in enumerate(documents))
        names = [issuer.iss for issuer in issuers if issuer.iss is not None]
        if len(set(names)) != len(names):
            self.refuse("issuers", "two have the same `iss`", "keep one")
        return issuers

    def _issuer(self, document: object, path: str) -> IssuerSettings:
        before = len(self.problems)
        issuer: IssuerSettings = self._section(IssuerSettings, document, path)
        if len(self.problems) > before:
            return issuer
        if issuer.iss is None:
            self.refuse(f"{path}.iss", "is missing", "give the name that stands in `iss`")
        if (issuer.jwks_url is None) == (issuer.jwks_file is None):
            self.refuse(path, "needs `jwks_url` or `jwks_file`, and not both", "say where its public keys are")
        return issuer


def _is_section(spec: Field[Any]) -> bool:
    return "kind" not in spec.metadata and spec.name != "issuers"


def _section_type(spec: Field[Any]) -> Any:
    return type(spec.default)


def _kind(spec: Field[Any]) -> Kind:
    kind = spec.metadata["kind"]
    assert isinstance(kind, Kind)
    return kind


def _scalar_fields() -> Iterator[tuple[str, Field[Any]]]:
    """Yield every setting with its dotted path, issuers apart."""
    for spec in fields(Settings):
        if "kind" in spec.metadata:
            yield spec.name, spec
        elif _is_section(spec):
            yield from ((f"{spec.name}.{inner.name}", inner) for inner in fields(_section_type(spec)))


def _environment_name(path: str) -> str:
    return ENVIRONMENT_PREFIX + path.upper().replace(".", "_")


# --- the README's table ---


def settings_table() -> str:
    """Return the Markdown table of all settings, as the README holds it."""
    rows = ["| setting | environment | value | default | meaning |", "|---|---|---|---|---|"]
    rows += [_row(path, f"`{_environment_name(path)}`", spec) for path, spec in _scalar_fields()]
    rows += [
        _row(f"issuers[].{spec.name}", "in the JSON of `PROBITY_ISSUERS`", spec) for spec in fields(IssuerSettings)
    ]
    return "\n".join(rows) + "\n"


def _row(path: str, environment: str, spec: Field[Any]) -> str:
    kind = _kind(spec)
    return f"| `{path}` | {environment} | {kind.form} | {_shown(spec.default)} | {spec.metadata['doc']} |"


def _shown(default: object) -> str:
    if default is None:
        return "–"
    if isinstance(default, tuple):
        return ", ".join(f"`{member}`" for member in default) or "empty"
    return f"`{default}`"
