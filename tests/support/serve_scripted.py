"""A gateway process with a scripted engine, for tests that kill it, starve it or look at what it leaves behind.

    python -m tests.support.serve_scripted --data DIR --port N [--database-url U] [--token-s 0.005]

It is the real `create_app` and the real server; only the engine is scripted. A PostgreSQL database is migrated
already. Credentials for an application and an auditor are left in DIR: `app.jwt`, `auditor.jwt`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from types import FrameType
from typing import NoReturn

from gateway.app import create_app, server
from gateway.diagnostics import install_diagnostics
from gateway.settings import Settings, load_settings
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tenant import activate_policy, credential, policy_text

LEASE_S = 1.0


def answer_to(prompt: str) -> str:
    """A long answer that names its question: one that got into another's record would be seen."""
    question = prompt.rpartition("<user>")[2].partition("\n")[0]
    if question.startswith("explode"):
        raise ValueError(question)  # as a bug would, with the prompt in its message
    return " ".join([question[::-1], *(f"{question}.{word}" for word in range(30))])


def main() -> None:
    arguments = _arguments()
    install_diagnostics()
    settings = _settings(arguments)

    async def step(position: int) -> None:
        await asyncio.sleep(arguments.token_s)

    engine = ScriptedEngine(answer_to, step=step, chunk=arguments.chunk)
    app = create_app(settings, engine=engine)
    activate_policy(app, policy_text(engine.model.digest))
    (settings.data_dir / "app.jwt").write_text(credential(app, "app"))
    (settings.data_dir / "auditor.jwt").write_text(credential(app, "auditor", subject="otto@test.example"))
    signal.signal(signal.SIGTERM, _end)  # the server raises it again once it has drained
    server(app).run_alone()


def _end(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _settings(arguments: argparse.Namespace) -> Settings:
    return load_settings(
        None,
        {},
        {
            "data_dir": arguments.data,
            "server.port": arguments.port,
            "database.url": arguments.database_url,
            "audit.low_water_mib": 1,
            "audit.lease_s": LEASE_S,
            "telemetry.otlp_endpoint": arguments.otlp,
            "telemetry.sample_ratio": 1.0,
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database-url")
    parser.add_argument("--otlp", help="send traces here")
    parser.add_argument("--token-s", type=float, default=0.005, help="seconds before each delta")
    parser.add_argument("--chunk", type=int, default=4, help="tokens a delta")
    return parser.parse_args()


if __name__ == "__main__":
    main()
