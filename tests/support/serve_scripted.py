"""A gateway process with a scripted engine, for tests that kill it, starve it or measure it.

    python -m tests.support.serve_scripted --data DIR --port N [--database-url U] [--token-s 0.01]

It is the real `create_app` on the real embedded default; only the engine is scripted. Credentials for an application
and an auditor are left in DIR (`app.jwt`, `auditor.jwt`), beside `database-url` and `trust.json`.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from gateway.app import create_app, run
from gateway.auth.development import DevelopmentIssuer
from gateway.settings import Settings, load_settings
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import TENANT, activate_test_policy

ANSWER = " ".join(f"word{index}" for index in range(60))


def main() -> None:
    arguments = _arguments()
    data = Path(arguments.data)
    settings = _settings(data, arguments.port, arguments.database_url)
    answer = ANSWER * arguments.repeat

    async def step(position: int) -> None:
        await asyncio.sleep(arguments.token_s)

    engine = ScriptedEngine(lambda prompt: answer, step=step, chunk=arguments.chunk)
    app = create_app(settings, engine=engine)
    activate_test_policy(app, engine.model.digest)
    issuer = DevelopmentIssuer.open(data / "keys")
    (data / "app.jwt").write_text(issuer.issue(TENANT, ["app"], subject="mia@test.example", client="svc-test"))
    (data / "auditor.jwt").write_text(issuer.issue(TENANT, ["auditor"], subject="otto@test.example"))
    (data / "database-url").write_text(settings.database.url)
    run(app, settings)


def _settings(data: Path, port: int, database_url: str | None) -> Settings:
    overrides: dict[str, str] = {"PROBITY_DATA_DIR": str(data), "PROBITY_SERVER_PORT": str(port)}
    if database_url is not None:
        overrides["PROBITY_DATABASE_URL"] = database_url
    return load_settings(None, overrides)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database-url")
    parser.add_argument("--token-s", type=float, default=0.005, help="seconds before each delta")
    parser.add_argument("--chunk", type=int, default=4, help="tokens a delta")
    parser.add_argument("--repeat", type=int, default=1, help="how often the answer repeats its words")
    return parser.parse_args()


if __name__ == "__main__":
    main()
