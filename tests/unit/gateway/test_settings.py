"""Settings: the last source wins, and every bad value is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.settings import SettingsError, load_settings, settings_table


def write(directory: Path, text: str) -> Path:
    path = directory / "probity.toml"
    path.write_text(text)
    return path


def paths_of(error: SettingsError) -> list[str]:
    return [problem.path for problem in error.problems]


def test_defaults_need_no_file_and_keep_everything_in_the_data_directory() -> None:
    settings = load_settings(None, {})
    assert settings.server.host == "127.0.0.1"
    assert settings.database_url == "sqlite:///probity-data/probity.sqlite3"
    assert settings.keystore_url != settings.database_url
    assert settings.trusts_development_issuer


def test_environment_wins_over_file_and_command_line_over_both(tmp_path: Path) -> None:
    config = write(tmp_path, "[server]\nport = 1\nhost = '0.0.0.0'\n[audit]\nlow_water_mib = 7\n")
    environment = {"PROBITY_SERVER_PORT": "2", "PROBITY_AUDIT_LOW_WATER_MIB": "9", "PATH": "/bin"}
    settings = load_settings(config, environment, {"server.port": 3, "data_dir": tmp_path, "server.host": None})
    assert (settings.server.port, settings.server.host, settings.audit.low_water_mib) == (3, "0.0.0.0", 9)
    assert settings.data_dir == tmp_path


def test_every_bad_value_is_named_at_once(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "colour = 1\ntelemetry = 3\n[server]\nport = '8080'\nhost = 'a b'\nprot = 1\nmax_body_bytes = true\n"
        "[engine]\nthreads = 0\n[database]\nurl = 'mysql://root:hunter2@h/d'\n[audit]\nappend_timeout_s = nan\n"
        "[[issuers]]\niss = 'x'\n[[issuers]]\njwks_file='k'\n"
        "[[issuers]]\niss='y'\njwks_file='k'\nalgorithms=['HS256']\n",
    )
    with pytest.raises(SettingsError) as caught:
        load_settings(config, {"PROBITY_LIMITS_MAX_GOVERNED": "many", "PROBITY_NO_SUCH": "1"})
    assert paths_of(caught.value) == [
        "PROBITY_NO_SUCH",
        "audit.append_timeout_s",
        "colour",
        "database.url",
        "engine.threads",
        "issuers[0]",
        "issuers[1].iss",
        "issuers[2].algorithms",
        "limits.max_governed",
        "server.host",
        "server.max_body_bytes",
        "server.port",
        "server.prot",
        "telemetry",
    ]
    assert "hunter2" not in str(caught.value)


def test_a_value_is_never_repeated_because_it_may_be_a_secret(tmp_path: Path) -> None:
    config = write(tmp_path, "[database]\nurl = 'postgresql+psycopg://u:hunter2@h/d'\n")
    assert "hunter2" not in repr(load_settings(config, {}))
    broken = write(tmp_path, "[database]\nurl = 'postgresql://u:hunter2@h/d\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(broken, {})
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml"):
        load_settings(tmp_path / "absent.toml", {})


def test_issuers_come_from_the_file_or_as_json_from_the_environment(tmp_path: Path) -> None:
    config = write(tmp_path, "[[issuers]]\niss='https://a'\njwks_url='https://a/keys'\nalgorithms=['ES256','RS256']\n")
    settings = load_settings(config, {})
    assert settings.issuers[0].algorithms == ("ES256", "RS256")
    assert not settings.trusts_development_issuer
    text = '[{"iss": "https://b", "jwks_file": "keys.json", "tenants": ["acme-bank"]}]'
    replaced = load_settings(config, {"PROBITY_ISSUERS": text})
    assert [issuer.iss for issuer in replaced.issuers] == ["https://b"]
    assert replaced.issuers[0].tenants == ("acme-bank",)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"iss":"a","iss":"b","jwks_file":"k"}]', "[" * 100])
def test_issuers_in_the_environment_that_are_not_a_json_list_of_objects_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="issuers"):
        load_settings(None, {"PROBITY_ISSUERS": text})


def test_two_issuers_of_one_name_are_refused() -> None:
    issuer = '{"iss": "https://b", "jwks_file": "keys.json"}'
    with pytest.raises(SettingsError, match="the same `iss`"):
        load_settings(None, {"PROBITY_ISSUERS": f"[{issuer},{issuer}]"})


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example/keys",
        "https://user:pw@id.example/keys",
        "ftp://id.example/keys",
        "https:///keys",
        "https://id.example/keys#x",
        "https://id.example:99999/keys",
        "http://127.0.0.1.evil.example/keys",
        "https://id.example/a b",
        "https://[::1/keys",
    ],
)
def test_keys_are_fetched_over_tls_only_unless_from_this_machine(url: str) -> None:
    with pytest.raises(SettingsError, match="jwks_url"):
        load_settings(None, {"PROBITY_ISSUERS": f'[{{"iss": "a", "jwks_url": "{url}"}}]'})


@pytest.mark.parametrize(
    "url", ["https://id.example/keys", "http://127.0.0.1:8/k", "http://[::1]/k", "http://localhost/k"]
)
def test_addresses_that_may_be_used(url: str) -> None:
    settings = load_settings(None, {"PROBITY_ISSUERS": f'[{{"iss": "a", "jwks_url": "{url}"}}]'})
    assert settings.issuers[0].jwks_url == url


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = settings_table().splitlines()
    assert len(rows) == 2 + 44
    assert all(row.count(" | ") == 4 for row in rows[2:])
    assert any(row.startswith("| `server.port` | `PROBITY_SERVER_PORT` | 0 … 65,535 | `8080` |") for row in rows)


def test_readme_holds_the_table() -> None:
    readme = Path(__file__).parents[3] / "README.md"
    assert settings_table() in readme.read_text()


def test_adapters_are_names_with_their_directories(tmp_path: Path) -> None:
    config = write(tmp_path, "[model]\nadapters = ['tone=/srv/a=b', 'terms-2=relative']\n")
    expected = (("tone", Path("/srv/a=b")), ("terms-2", Path("relative")))
    assert load_settings(config, {}).model.adapter_directories == expected
    assert load_settings(None, {"PROBITY_MODEL_ADAPTERS": "tone=/srv/a=b, terms-2=relative"}).model == (
        load_settings(config, {}).model
    )
    for wrong in ("tone", "=x", "tone=", "a b=x", "tone=x\0"):
        with pytest.raises(SettingsError) as caught:
            load_settings(None, {}, {"model.adapters": [wrong]})
        assert paths_of(caught.value) == ["model.adapters"]
