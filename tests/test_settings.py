"""Settings: where each value comes from, what is refused and in which words, and what each one does."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_kit import settings as module
from rag_kit.errors import SettingsError
from rag_kit.settings import PROFILES, Settings, describe, find_root, redact

ROOT = Path(__file__).parent.parent
NAMES = [name.upper() for name in Settings.model_fields]
posix_only = pytest.mark.skipif(os.name == "nt", reason="a drive letter is right on Windows")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*NAMES, *(name.lower() for name in NAMES)]:
        monkeypatch.delenv(name, raising=False)


def load(folder: Path, text: str | bytes = "", **overrides: object) -> Settings:
    data = text.encode() if isinstance(text, str) else text
    (folder / ".env").write_bytes(data)
    return Settings.load(folder, **overrides)


def refusal(folder: Path, text: str | bytes, **overrides: object) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load(folder, text, **overrides)
    return caught.value


# --- where values come from ---------------------------------------------------------------------


def test_without_anything_the_embedded_profile_holds(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path)
    assert (settings.base_model_name, settings.embedding_model, settings.max_new_tokens) == (
        "embedded",
        "embedded",
        128,
    )
    assert (settings.ollama_model, settings.ollama_base_url) == ("qwen3:4b", "http://localhost:11434")
    assert (settings.device, settings.temperature, settings.top_p, settings.api_port) == (
        "auto",
        0.7,
        0.9,
        8001,
    )
    assert settings.use_lora_default and settings.cache_dir is None
    assert settings.lora_model_path == tmp_path / "lora_adapters"
    assert settings.raw("LORA_MODEL_PATH") == "./lora_adapters"
    assert settings.origin("base_model_name") == "profile embedded" and settings.origin("DEVICE") == "default"


def test_the_guides_template_is_valid_as_it_is_and_gives_the_guides_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, (ROOT / ".env.lora").read_bytes())
    assert settings.warnings == []
    assert settings.base_model_name == "Qwen/Qwen2.5-1.5B-Instruct"
    assert settings.embedding_model == "quentinz/bge-large-zh-v1.5"
    assert (settings.max_new_tokens, settings.device, settings.api_host) == (512, "auto", "127.0.0.1")
    by_name = Settings.load(tmp_path / "elsewhere", rag_kit_profile="guide")
    assert {name: getattr(settings, name) for name in PROFILES["guide"]} == {
        name: getattr(by_name, name) for name in PROFILES["guide"]
    }


def test_the_template_shows_every_setting(tmp_path: Path) -> None:
    text = (ROOT / ".env.lora").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"{name}=" not in text] == []
    # and with its comments taken off every line of it is a valid setting, on one system or the other
    lines = [
        line.removeprefix("# ") for line in text.splitlines() if "=" in line and ("# " not in line[2:] or 1)
    ]
    proper = [
        line
        for line in lines
        if line.split("=")[0] in NAMES and "E:" not in line and "your-proxy" not in line
    ]
    assert load(tmp_path, "\n".join(proper)).cache_dir == Path("/data/llm_models")


def test_a_env_file_alone_changes_no_profile(tmp_path: Path) -> None:
    assert load(tmp_path, "DEVICE=cpu\n").base_model_name == "embedded"


def test_arguments_precede_the_environment_then_the_file_then_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "# a comment\n\nMAX_NEW_TOKENS=2\nRAG_KIT_PROFILE=guide\n"
    assert load(tmp_path, text).origin("max_new_tokens") == ".env line 3"
    assert load(tmp_path, text).max_new_tokens == 2
    assert load(tmp_path, text).origin("base_model_name") == "profile guide"
    monkeypatch.setenv("Max_New_Tokens", "3")
    assert (load(tmp_path, text).max_new_tokens, load(tmp_path, text).origin("max_new_tokens")) == (
        3,
        "environment",
    )
    monkeypatch.setenv("MAX_NEW_TOKENS", "")  # an empty value is none
    monkeypatch.delenv("Max_New_Tokens")
    assert load(tmp_path, text).max_new_tokens == 2
    given = load(tmp_path, text, max_new_tokens=4, device=None)
    assert (given.max_new_tokens, given.origin("MAX_NEW_TOKENS")) == (4, "argument")
    assert given.origin("device") == "default"


def test_the_profile_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_KIT_PROFILE", "Guide")
    assert Settings.load(tmp_path).max_new_tokens == 512


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("DEVICE=auto  # auto, cuda, cpu", "device", "auto"),
        ("preload_models=true", "preload_models", True),
        ("export TOP_P = '0.5'", "top_p", 0.5),
        ("CACHE_DIR=~/模型 缓存", "cache_dir", Path.home() / "模型 缓存"),
        ("OLLAMA_BASE_URL=192.168.1.5:11434/", "ollama_base_url", "http://192.168.1.5:11434"),
        ("HF_ENDPOINT=hf-mirror.com/", "hf_endpoint", "https://hf-mirror.com"),
        ("HTTP_PROXY=127.0.0.1:7890", "http_proxy", "http://127.0.0.1:7890"),
        ("LOG_LEVEL=debug", "log_level", "DEBUG"),
        ("OLLAMA_MODEL=", "ollama_model", "qwen3:4b"),
        *(
            (f"USE_LORA_DEFAULT={word}", "use_lora_default", True)
            for word in ("true", "1", "YES", "on", "True")
        ),
        *((f"USE_LORA_DEFAULT={word}", "use_lora_default", False) for word in ("false", "0", "no", "Off")),
    ],
)
@pytest.mark.parametrize("frame", ["{}", "\ufeff{}\r\n", "# 注释\n{}\n"])
def test_lines_as_people_write_them(tmp_path: Path, line: str, name: str, value: object, frame: str) -> None:
    assert getattr(load(tmp_path, frame.format(line)), name) == value


def test_a_windows_path_without_quotes_is_kept_letter_by_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_check_place", lambda *told: None)
    assert load(tmp_path, "CACHE_DIR=E:\\LLM_Models\n").raw("cache_dir") == "E:\\LLM_Models"
    assert load(tmp_path, "CACHE_DIR='E:\\new'\n").raw("cache_dir") == "E:\\new"


def test_relative_places_are_taken_from_the_root(tmp_path: Path) -> None:
    settings = load(tmp_path, "LORA_MODEL_PATH=../适配器\nVECTOR_STORE_PATH=/data/store\nCACHE_DIR=cache\n")
    assert settings.root == tmp_path
    assert settings.lora_model_path == tmp_path.parent / "适配器"
    assert settings.vector_store_path == Path("/data/store") and settings.cache_dir == tmp_path / "cache"
    assert settings.path("a/b") == tmp_path / "a/b" and settings.path("/a") == Path("/a")


def test_settings_are_immutable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load(tmp_path).device = "cpu"  # type: ignore[misc]


def test_the_root_is_the_checkout_around_else_a_folder_with_a_env_else_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "张三 的项目"
    (clone / "rag_kit").mkdir(parents=True)
    (clone / "notebooks").mkdir()
    (clone / "pyproject.toml").touch()
    (clone / "rag_kit" / "settings.py").touch()
    for inside in (clone, clone / "notebooks"):
        (inside / ".env").touch()
        monkeypatch.chdir(inside)
        assert find_root() == clone
    monkeypatch.chdir(tmp_path)
    assert find_root() == ROOT
    (tmp_path / ".env").touch()
    assert find_root() == tmp_path


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["CACHE_DIR=/模型\n".encode("gbk"), "CACHE_DIR=/x\n".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_named_with_the_way_to_save_it(tmp_path: Path, data: bytes) -> None:
    error = refusal(tmp_path, data)
    assert error.text("en")[0] == f"{tmp_path / '.env'} is not UTF-8 text (GBK or UTF-16, perhaps)."
    assert "iconv -f GBK -t UTF-8" in error.text("en")[1]
    assert error.text("zh")[0] == f"{tmp_path / '.env'} 不是 UTF-8 文本（可能是 GBK 或 UTF-16）。"
    assert "编码：UTF-8" in error.text("zh")[1]


@posix_only
@pytest.mark.parametrize("name", ["CACHE_DIR", "LORA_MODEL_PATH", "VECTOR_STORE_PATH", "BASE_MODEL_NAME"])
@pytest.mark.parametrize("value", ["E:\\LLM_Models", "d:/models", "..\\models", "\\\\server\\models"])
def test_a_windows_path_elsewhere_is_named(tmp_path: Path, name: str, value: str) -> None:
    error = refusal(tmp_path, f"\n{name}={value}\n")
    assert error.text("en")[0].startswith(
        f"{name} (.env line 2) is a Windows path, {value}, and this system is "
    )
    assert error.text("en")[1].startswith(f"Set {name} to a folder of this system")
    assert f"{name}（.env line 2）是 Windows 路径 {value}" in error.text("zh")[0]
    assert f"请把 {name} 设为本系统的目录" in error.text("zh")[1]


@pytest.mark.parametrize(("value", "shown"), [('"E:\\new"', "E:\\new"), ('"E:\\temp"', "E:\\temp")])
def test_a_decoded_escape_in_a_path_is_named(tmp_path: Path, value: str, shown: str) -> None:
    error = refusal(tmp_path, f"CACHE_DIR={value}\n")
    assert error.text("en") == (
        f"CACHE_DIR (.env line 1) holds a control character: {shown}.",
        "A backslash inside double quotes is an escape: "
        "write the path in single quotes, or with forward slashes.",
    )
    assert "双引号中的反斜杠是转义符" in error.text("zh")[1]


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("DEVICE=gpu", "auto | cpu | cuda"),
        ("API_PORT=70000", "integer ≥ 1, ≤ 65535"),
        ("API_PORT=八千", "integer ≥ 1, ≤ 65535"),
        ("TOP_P=0", "number > 0, ≤ 1"),
        ("MAX_NEW_TOKENS=0", "integer ≥ 1"),
        ("USE_LORA_DEFAULT=maybe", "true | false | 1 | 0 | yes | no | on | off"),
        ("RAG_KIT_PROFILE=gide", "embedded | guide"),
        ("QUANTIZATION_TYPE=int3", "int8 | int4"),
        ("HF_ENDPOINT=ftp://mirror", "https://HOST"),
        ("RAG_KIT_LANG=fr", "auto | en | zh"),
    ],
)
def test_a_wrong_value_is_told_with_its_origin_and_what_is_allowed(
    tmp_path: Path, line: str, allowed: str
) -> None:
    error = refusal(tmp_path, f"\n{line}\n", rag_kit_profile=None if "PROFILE" in line else "guide")
    if "PROFILE" not in line:
        assert f"{line} (.env line 2) → {allowed}." in error.text("en")[0]
    assert f"→ {allowed}" in error.text("zh")[0] and "设置项的值不合法" in error.text("zh")[0]
    assert "`rag-kit config`" in error.text("en")[1] and "`rag-kit config`" in error.text("zh")[1]


def test_all_wrong_values_are_told_at_once_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "ftp://wang:geheim@proxy:1")
    text = refusal(tmp_path, "DEVICE=gpu\n", top_p=2).text("en")[0]
    assert "DEVICE=gpu (.env line 1)" in text and "TOP_P=2 (argument)" in text
    assert "HTTP_PROXY=ftp://wang:***@proxy:1 (environment)" in text and "geheim" not in text


def test_an_unknown_argument_lists_the_settings(tmp_path: Path) -> None:
    error = refusal(tmp_path, "", max_tokens=3)
    assert (
        error.text("en")[0] == "max_tokens is no setting of rag-kit."
        and "MAX_NEW_TOKENS" in error.text("en")[1]
    )
    assert error.text("zh")[0] == "max_tokens 不是 rag-kit 的设置项。"


# --- warnings, redaction, description -----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("TEMPRATURE", "TEMPERATURE"),
        ("api_prot", "API_PORT"),
        ("BASE_MODEL", "BASE_MODEL_NAME"),
        ("LORA_PATH", "LORA_MODEL_PATH"),
        ("VECTOR_STORE", "VECTOR_STORE_PATH"),
        ("MODEL_NAME", "BASE_MODEL_NAME"),
        ("HF_ENDPIONT", "HF_ENDPOINT"),
    ],
)
def test_a_misspelt_key_warns_with_the_nearest_name(
    tmp_path: Path, key: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(tmp_path, f"\n{key}=1\n")
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    assert settings.warnings == [f".env line 2: {key} is no setting and is ignored; did you mean {near}?"]
    monkeypatch.setenv("RAG_KIT_LANG", "zh")
    assert settings.warnings == [f".env 第 2 行：{key} 不是设置项，已忽略；您是否想写 {near}？"]


@pytest.mark.parametrize(
    "key",
    [
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "HF_TOKEN",
        "HF_HOME",
        "CUDA_VISIBLE_DEVICES",
        "OLLAMA_HOST",
        "ALL_PROXY",
    ],
)
def test_keys_of_other_programs_do_not_warn(tmp_path: Path, key: str) -> None:
    assert load(tmp_path, f"{key}=x\n").warnings == []


def test_a_line_that_is_none_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    settings = load(tmp_path, "DEVICE=cpu\n'unfinished\nTOP_P=0.5\n")
    assert settings.warnings == [".env line 2 is not of the form NAME=value and is ignored."]
    assert (settings.device, settings.top_p) == ("cpu", 0.5)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@host:1/a", "http://user:***@host:1/a"),
        ("http://token@host", "http://***@host"),
        ("socks5://u:p@ss@host", "socks5://u:***@host"),
        ("http://host:1/path", "http://host:1/path"),
    ],
)
def test_secrets_of_urls_are_redacted(url: str, shown: str) -> None:
    assert redact(url) == shown


@given(
    st.text("abcXYZ0189-._~!$&'()*+,;=", min_size=1),
    st.text("abcXYZ0189-._~!$&'()*+,;=:@/?#", min_size=3),
    st.text("abcxyz0189", min_size=1),
)
def test_no_password_survives_redaction(user: str, password: str, host: str) -> None:
    assert redact(f"see http://{user}:{password}@{host}/x now") == f"see http://{user}:***@{host}/x now"


def test_describe_has_a_row_for_every_setting_in_both_languages(tmp_path: Path) -> None:
    settings = load(tmp_path, "HTTPS_PROXY=http://u:geheim@h:1\nVERBOSE=on\n")
    rows = {name: rest for name, *rest in describe(settings, "en")}
    assert list(rows) == NAMES
    assert rows["HTTPS_PROXY"] == ["http://u:***@h:1", ".env line 1", "The proxy for https:// addresses."]
    assert rows["VERBOSE"][:2] == ["true", ".env line 2"] and rows["CACHE_DIR"][:2] == ["", "default"]
    chinese = [row[3] for row in describe(settings, "zh")]
    assert all(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in chinese)
    assert "geheim" not in repr(describe(settings))


# --- start, and the effect of each setting that acts here ----------------------------------------

PROBE = """
import json, logging, os, sys
from rag_kit import settings as s
from rag_kit.errors import SettingsError, language
before = dict(os.environ)
settings = s.start()
assert s.get_settings() is settings
log = logging.getLogger("rag_kit.test")
log.debug("a-debug-line"); log.info("an-info-line"); log.warning("a-warning-line")
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
print(json.dumps({"environment": changed, "language": language(), "root": str(settings.root)}))
"""


def probe(folder: Path, text: str, **environment: str) -> tuple[dict[str, object], str]:
    """Start in a process of its own, with nothing but a `.env`; returns what it saw, and its log."""
    import json

    (folder / ".env").write_text(text, encoding="utf-8")
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "en_US.UTF-8", "HOME": str(folder)}
    if os.name == "nt":
        bare["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=folder,
        env=bare | {"PYTHONUTF8": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout), done.stderr


def environment_of(folder: Path, text: str, **environment: str) -> dict[str, str]:
    changed = probe(folder, text, **environment)[0]["environment"]
    assert isinstance(changed, dict)
    return changed


def test_log_level_and_verbose_choose_what_is_logged(tmp_path: Path) -> None:
    assert "an-info-line" in (log := probe(tmp_path, "")[1]) and "a-debug-line" not in log
    assert (
        "an-info-line" not in (log := probe(tmp_path, "LOG_LEVEL=WARNING\n")[1]) and "a-warning-line" in log
    )
    assert "a-warning-line" not in probe(tmp_path, "LOG_LEVEL=ERROR\n")[1]
    assert "a-debug-line" in probe(tmp_path, "VERBOSE=true\n")[1]
    assert "a-debug-line" in probe(tmp_path, "LOG_LEVEL=DEBUG\nVERBOSE=false\n")[1]


def test_the_language_of_messages_is_rag_kit_lang(tmp_path: Path) -> None:
    seen, log = probe(tmp_path, "RAG_KIT_LANG=zh\nDEVCE=cpu\n")
    assert seen["language"] == "zh" and ".env 第 2 行：DEVCE 不是设置项" in log
    seen, log = probe(tmp_path, "RAG_KIT_LANG=en\nDEVCE=cpu\n", LANG="zh_CN.UTF-8")
    assert seen["language"] == "en" and "did you mean DEVICE?" in log


@pytest.mark.parametrize(
    ("locale", "language"), [("zh_CN.UTF-8", "zh"), ("en_GB.UTF-8", "en"), ("C.UTF-8", "en")]
)
def test_auto_is_the_language_of_the_system_even_where_its_locale_is_not_installed(
    tmp_path: Path, locale: str, language: str
) -> None:
    assert probe(tmp_path, "RAG_KIT_LANG=auto\n", LANG=locale)[0]["language"] == language


def test_a_mirror_is_handed_to_the_hub_library_with_the_xet_path_off(tmp_path: Path) -> None:
    changed = environment_of(tmp_path, "HF_ENDPOINT=https://hf-mirror.com/\n")
    assert (changed["HF_ENDPOINT"], changed["HF_HUB_DISABLE_XET"]) == ("https://hf-mirror.com", "1")
    assert "HF_HUB_DISABLE_XET" not in environment_of(tmp_path, "HF_ENDPOINT=https://huggingface.co\n")
    assert environment_of(tmp_path, "") == {}


def test_proxies_are_handed_on_in_both_cases_and_never_stand_before_this_machine_or_ollama(
    tmp_path: Path,
) -> None:
    text = "HTTP_PROXY=http://p:1\nHTTPS_PROXY=q:2\nNO_PROXY=intranet.example, 10.0.0.1\nOLLAMA_BASE_URL=http://gpu-box:11434\n"
    changed = environment_of(tmp_path, text)
    assert (changed["HTTP_PROXY"], changed["http_proxy"]) == ("http://p:1", "http://p:1")
    assert (changed["HTTPS_PROXY"], changed["https_proxy"]) == ("http://q:2", "http://q:2")
    direct = "intranet.example,10.0.0.1,localhost,127.0.0.1,::1,gpu-box"
    assert changed["NO_PROXY"] == changed["no_proxy"] == direct
    without = environment_of(tmp_path, "NO_PROXY=other.example\nHTTP_PROXY=http://p:1\n")
    assert without["NO_PROXY"] == "other.example,localhost,127.0.0.1,::1"
    of_the_shell = environment_of(tmp_path, "", http_proxy="http://shell:3", NO_PROXY="mine")
    assert (
        of_the_shell["NO_PROXY"] == "mine,localhost,127.0.0.1,::1"
        and of_the_shell["HTTP_PROXY"] == "http://shell:3"
    )


def test_with_a_cache_dir_every_cache_lies_under_it_but_where_the_user_said_otherwise(tmp_path: Path) -> None:
    login = tmp_path / ".cache" / "huggingface" / "token"
    login.parent.mkdir(parents=True)
    login.touch()
    changed = environment_of(tmp_path, "CACHE_DIR=models\n", TORCH_HOME="/mine")
    assert changed["HF_HUB_CACHE"] == str(tmp_path / "models")
    assert changed["HF_HOME"] == str(tmp_path / "models" / "rag-kit" / "huggingface")
    assert changed["HF_TOKEN_PATH"] == str(login) and "TORCH_HOME" not in changed


def test_a_cache_dir_that_cannot_be_written_moves_no_cache_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    seen, log = probe(tmp_path, "CACHE_DIR=models\n")
    assert seen["environment"] == {"HF_HUB_CACHE": str(tmp_path / "models")}
    assert f"CACHE_DIR={tmp_path / 'models'} cannot be written to (" in log
    assert "无法写入 CACHE_DIR=" in probe(tmp_path, "CACHE_DIR=models\nRAG_KIT_LANG=zh\n")[1]


def test_keys_of_other_programs_are_passed_on_unless_set(tmp_path: Path) -> None:
    text = "OPENAI_API_KEY=from-file\nTEMPRATURE=1\nHF_TOKEN=\n"
    assert environment_of(tmp_path, text) == {"OPENAI_API_KEY": "from-file"}
    assert environment_of(tmp_path, text, OPENAI_API_KEY="from-shell") == {}


def test_a_second_start_forgets_the_first_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_process", None)
    level = logging.getLogger().level
    monkeypatch.setenv("OTHER", "kept")
    before = dict(os.environ)
    (tmp_path / ".env").write_text("HTTP_PROXY=http://one:1\nOTHER=no\nNEW=1\n", encoding="utf-8")
    assert module.start(tmp_path).http_proxy == os.environ["HTTP_PROXY"] == "http://one:1"
    assert (os.environ["OTHER"], os.environ["NEW"]) == ("kept", "1")
    (tmp_path / ".env").write_text("HTTP_PROXY=http://two:2\n", encoding="utf-8")
    second = module.start(tmp_path)
    assert second.http_proxy == os.environ["http_proxy"] == "http://two:2"
    assert second.origin("http_proxy") == ".env line 1" and "NEW" not in os.environ
    (tmp_path / ".env").unlink()
    module.start(tmp_path)
    assert dict(os.environ) == before
    logging.getLogger().setLevel(level)
