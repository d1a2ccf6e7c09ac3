"""Adapters over HTTP: the alias of a request decides, through its policy, which model version answers it.

A real tiny model with two adapters, loaded as the settings say; a policy approves each version under an alias.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from typer.testing import CliRunner

from audit.records import SYSTEM
from engine.request import Engine, ModelVersion
from gateway.app import load_model
from gateway.cli import app
from gateway.settings import load_settings
from tests.support import sdk
from tests.support.adapters import write_adapter
from tests.support.gateway import RunningGateway, running_gateway
from tests.support.officers import Hand, leaves
from tests.support.sdk import streamed_text
from tests.support.tenant import MODEL, activate_policy, policy_text

TONE, TERMS, UNAPPROVED, ABSENT = "bank-tone", "bank-terms", "bank-draft", "bank-next"
QUESTION = "Wie viel kostet ein Konto?"


@pytest.fixture(scope="module")
def engine(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root, model, threads = tmp_path_factory.mktemp("adapters"), tiny_models["qwen3"], torch.get_num_threads()
    directories = [f"{name}={write_adapter(root / name, model, seed=seed)}" for seed, name in enumerate(("a", "b"))]
    stated = {"model.path": str(model), "model.adapters": directories, "engine.threads": 1, "engine.kv_cache_mib": 8}
    loaded = load_model(load_settings(None, {}, stated))
    yield loaded
    torch.set_num_threads(threads)


def version(engine: Engine, adapter: str) -> ModelVersion:
    return next(found for found in engine.versions.values() if found.adapter and found.adapter.name == adapter)


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    approved = {
        TONE: version(engine, "a").digest,
        TERMS: version(engine, "b").digest,
        UNAPPROVED: version(engine, "b").digest,
        ABSENT: "sha256:" + "9" * 64,
    }
    text = policy_text(engine.model.digest).replace(
        f"models_any: [{MODEL}]", f"models_any: [{MODEL}, {TONE}, {TERMS}, {ABSENT}]"
    )
    text += "".join(
        f'  {alias}: {{version: "{digest}", approval: TEST-2, expires: "2099-12-31"}}\n'
        for alias, digest in approved.items()
    )
    with running_gateway(tmp_path_factory.mktemp("data"), engine) as running:
        activate_policy(running.app, text)
        yield running


def ask(client: openai.OpenAI, alias: str, **more: Any) -> Any:
    asked = {"seed": 7, "max_tokens": 24, "messages": [{"role": "user", "content": QUESTION}], **more}
    return client.chat.completions.with_raw_response.create(model=alias, **asked)


def test_each_alias_is_listed_with_the_version_it_stands_for(client: openai.OpenAI, engine: Engine) -> None:
    listed = {model.id: model.to_dict()["version"] for model in client.models.list()}
    assert listed == {
        MODEL: engine.model.digest,
        TONE: version(engine, "a").digest,
        TERMS: version(engine, "b").digest,
        UNAPPROVED: version(engine, "b").digest,
    }
    assert client.models.retrieve(TONE).to_dict()["version"] == listed[TONE]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(ABSENT)


def test_the_alias_chooses_and_the_record_names_the_version_and_the_adapter(
    client: openai.OpenAI, auditor: Hand, engine: Engine
) -> None:
    answers = {}
    for alias, name in ((MODEL, None), (TONE, "a"), (TERMS, "b")):
        response = ask(client, alias)
        wanted = engine.model if name is None else version(engine, name)
        answers[alias] = response.parse().choices[0].message.content
        assert response.headers["probity-model"] == wanted.digest
        story = auditor.get(f"/audit/requests/{response.headers['x-request-id']}").raise_for_status().json()
        assert (story["model"]["alias"], story["model"]["version"]) == (alias, wanted.digest)
        assert story["model"].get("adapter") == (wanted.adapter.digest if wanted.adapter else None)
        assert story["model"]["weights"] == engine.model.weights
        found = auditor.get("/audit/requests", model=wanted.digest, **_window()).raise_for_status().json()
        assert response.headers["x-request-id"] in {row["request_id"] for row in found["requests"]}
    assert len(set(answers.values())) == 3


def _window() -> dict[str, str]:
    return {"from": "2026-01-01T00:00:00Z", "to": "2035-01-01T00:00:00Z"}


@pytest.mark.parametrize("mode", ["regenerate", "forced"])
@pytest.mark.parametrize("alias", [TONE, TERMS, MODEL])
def test_an_answer_replays_with_the_adapter_that_gave_it(
    client: openai.OpenAI, auditor: Hand, alias: str, mode: str
) -> None:
    response = ask(client, alias, n=2, temperature=0.8)
    replayed = auditor.post(f"/audit/requests/{response.headers['x-request-id']}:replay", {"mode": mode})
    outcome = replayed.raise_for_status().json()
    assert (outcome["outcome"], outcome["model"]) == ("identical", response.headers["probity-model"])
    assert len(outcome["choices"]) == 2


def test_a_streamed_answer_and_a_vector_are_of_the_adapter_too(client: openai.OpenAI, auditor: Hand) -> None:
    said = set()
    vectors = set()
    for alias in (MODEL, TONE, TERMS):
        whole = ask(client, alias).parse().choices[0].message.content
        assert streamed_text(sdk.ask(client, QUESTION, model=alias, seed=7, max_tokens=24, stream=True)) == whole
        said.add(whole)
        response = client.embeddings.with_raw_response.create(model=alias, input=QUESTION, encoding_format="base64")
        vectors.add(str(response.parse().data[0].embedding))
        again = auditor.post(f"/audit/requests/{response.headers['x-request-id']}:replay", {"mode": "regenerate"})
        assert again.raise_for_status().json()["outcome"] == "identical"
    assert (len(said), len(vectors)) == (3, 3)


def test_an_alias_is_decided_on_as_any_other(client: openai.OpenAI, auditor: Hand, engine: Engine) -> None:
    for alias, named in (
        (UNAPPROVED, version(engine, "b").digest),  # loaded, but no rule allows it
        (ABSENT, engine.model.digest),  # allowed, but not loaded
        ("a", engine.model.digest),  # the name that the settings have for it is no alias
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, alias)
        assert refused.value.code == "model_not_found"
        assert refused.value.response.headers["probity-model"] == named
        story = auditor.get(f"/audit/requests/{refused.value.response.headers['x-request-id']}").json()
        assert story["status"] == "denied"


def test_every_version_that_was_loaded_is_on_record(gateway: RunningGateway, engine: Engine) -> None:
    loaded = [leaf.body for leaf in leaves(gateway, SYSTEM, "model.loaded")]
    assert {body["version"] for body in loaded} == set(engine.versions)
    adapters = [body["adapter"] for body in loaded if "adapter" in body]
    assert adapters == [
        {"name": name, "digest": getattr(version(engine, name).adapter, "digest", None)} for name in ("a", "b")
    ]


def test_the_command_line_prints_the_digest_that_a_policy_approves(
    engine: Engine, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "elsewhere", tiny_models["qwen3"], seed=0)  # the files of `a`
    printed = CliRunner().invoke(app, ["model", "digest", str(tiny_models["qwen3"]), "--adapter", str(adapter)])
    assert (printed.exit_code, printed.stdout.strip()) == (0, version(engine, "a").digest)
    assert "adapter: sha256:" in printed.stderr
    (adapter / "adapter_config.json").unlink()
    refused = CliRunner().invoke(app, ["model", "digest", str(tiny_models["qwen3"]), "--adapter", str(adapter)])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "`adapter_config.json` is missing" in refused.stderr
