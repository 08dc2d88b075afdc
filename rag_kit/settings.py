"""Every environment variable: its meaning, its default, and where its value came from.

Knows the variables, the two profiles and the `.env` file; knows nothing of models or indexes. Values
come from arguments, else the environment, else `.env` in the root, else the profile, else the default.
`start` is what every entry point calls first; nothing happens at import.
"""

import logging
import os
import platform
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, SettingsConfigDict

from rag_kit.envfile import judge_keys, read_env_file
from rag_kit.errors import SettingsError, message, use_language

PROFILES: dict[str, dict[str, Any]] = {
    "embedded": {"base_model_name": "embedded", "embedding_model": "embedded", "max_new_tokens": 128},
    "guide": {
        "base_model_name": "Qwen/Qwen2.5-1.5B-Instruct",
        "embedding_model": "quentinz/bge-large-zh-v1.5",
        "max_new_tokens": 512,
    },
}
FOLDERS = ("lora_model_path", "vector_store_path", "cache_dir")
_PLACES = (*FOLDERS, "base_model_name", "embedding_model")

logger = logging.getLogger("rag_kit.settings")


def _folded(value: object, fold: Any = str.lower) -> object:
    return fold(value.strip()) if isinstance(value, str) else value


def _address(value: object, scheme: str = "http") -> object:
    if not isinstance(value, str):
        return value
    value = value.strip().rstrip("/")
    return value if "://" in value else f"{scheme}://{value}"


Lower = BeforeValidator(_folded)
Upper = BeforeValidator(partial(_folded, fold=str.upper))
Proxy = Annotated[
    str,
    BeforeValidator(_address),
    Field(pattern=r"^(https?|socks[45][ah]?)://[^\s/]+", examples=["http://HOST:PORT"]),
]


class Settings(BaseSettings):
    """The settings of one project, immutable; made by `Settings.load`.

    An attribute is a variable's name in lower case. What each means stands in the catalogue
    (`setting_<name>`), in English and Chinese, and is shown by `describe`.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_ignore_empty=True, env_file=None, hide_input_in_errors=True
    )

    rag_kit_profile: Annotated[Literal["embedded", "guide"], Lower] = "embedded"
    base_model_name: str
    lora_model_path: Path = Field("./lora_adapters")  # type: ignore[assignment]
    lora_default: str | None = None
    use_lora_default: Annotated[bool, Lower] = True
    cache_dir: Path | None = None
    embedding_model: str
    vector_store_path: Path = Field("./vector_store")  # type: ignore[assignment]
    ollama_base_url: Annotated[
        str, BeforeValidator(_address), Field(pattern=r"^https?://[^\s/]+", examples=["http://HOST:PORT"])
    ] = "http://localhost:11434"
    ollama_model: str = "qwen3:4b"
    engine: Annotated[Literal["auto", "llama.cpp", "transformers"], Lower] = "auto"
    lora_pinned: str | None = None
    device: Annotated[Literal["auto", "cpu", "cuda"], Lower] = "auto"
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(0.7, ge=0, le=5)
    top_p: float = Field(0.9, gt=0, le=1)
    enable_quantization: Annotated[bool, Lower] = False
    quantization_type: Annotated[Literal["int8", "int4"], Lower] = "int8"
    enable_fp16: Annotated[bool, Lower] = False
    cuda_memory_fraction: float = Field(1.0, gt=0, le=1)
    batch_size: Annotated[int, Field(ge=1)] | None = None
    preload_models: Annotated[bool, Lower] = False
    api_host: str = "127.0.0.1"
    api_port: int = Field(8001, ge=1, le=65535)
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Upper] = "INFO"
    verbose: Annotated[bool, Lower] = False
    rag_kit_lang: Annotated[Literal["auto", "en", "zh"], Lower] = "auto"
    hf_endpoint: (
        Annotated[
            str,
            BeforeValidator(partial(_address, scheme="https")),
            Field(pattern=r"^https?://[^\s/]+", examples=["https://HOST"]),
        ]
        | None
    ) = None
    http_proxy: Proxy | None = None
    https_proxy: Proxy | None = None
    no_proxy: str | None = None

    _root: Path = PrivateAttr()
    _given: dict[str, tuple[Any, str]] = PrivateAttr(default_factory=dict)
    _foreign: dict[str, str] = PrivateAttr(default_factory=dict)
    _warnings: list[tuple[str, dict[str, Any]]] = PrivateAttr(default_factory=list)

    @classmethod
    def load(cls, root: Path | None = None, **overrides: Any) -> Self:
        """Read the settings of the project at `root` (found by `find_root` when not given).

        `overrides` are by attribute name; None means not given. Relative folders are taken from the
        root. Raises SettingsError: an unreadable `.env`, a value that is not allowed.
        """
        root = (root or find_root()).absolute()
        for name in overrides.keys() - cls.model_fields.keys():
            names = ", ".join(cls.model_fields).upper()
            raise SettingsError("setting_unknown", name=name, names=names)
        entries = read_env_file(root / ".env")
        lines = {key.lower(): line for key, (_, line) in entries.items()}
        given: dict[str, tuple[Any, str]] = {
            name: (value, "argument") for name, value in overrides.items() if value not in (None, "")
        }
        for name, value in EnvSettingsSource(cls)().items():
            given.setdefault(name, (value, "environment"))
        for name, value in DotEnvSettingsSource(cls, root / ".env", "utf-8-sig")().items():
            if name in cls.model_fields:
                given.setdefault(name, (value, f".env line {lines[name]}"))
        profile = str(given.get("rag_kit_profile", ("embedded", ""))[0]).strip().lower()
        for name, value in PROFILES.get(profile, {}).items():
            given.setdefault(name, (value, f"profile {profile}"))
        for name, field in cls.model_fields.items():
            given.setdefault(name, (field.default, "default"))

        values = {name: value for name, (value, _) in given.items()}
        for name in _PLACES:
            _check_place(name, *given[name])
        for name in FOLDERS:
            if values[name] is not None:
                values[name] = _absolute(root, values[name])
        try:
            settings = cls(**values)  # every value is given, so pydantic adds none from the environment
        except ValidationError as error:
            raise SettingsError("setting_invalid", problems=_problems(cls, error, given)) from None
        settings._root, settings._given = root, given
        settings._foreign, settings._warnings = judge_keys(entries, cls.model_fields)
        return settings

    @property
    def root(self) -> Path:
        """The project's folder: where `.env` stands and from where relative folders are taken."""
        return self._root

    @property
    def warnings(self) -> list[str]:
        """What looks wrong in `.env` and did no harm, in the reader's language."""
        return [message(key, **values) for key, values in self._warnings]

    def origin(self, name: str) -> str:
        """Return `argument`, `environment`, `.env line 3`, `profile guide` or `default`."""
        return self._given[name.lower()][1]

    def raw(self, name: str) -> Any:
        """Return a value as it was written (`./lora_adapters`), before anything was made of it."""
        return self._given[name.lower()][0]

    def path(self, value: str | Path) -> Path:
        """Return `value` as an absolute path; a relative one is taken from the root."""
        return _absolute(self._root, value)


def find_root() -> Path:
    """Return the project's folder.

    It is the checkout that the working directory lies in; else the working directory if it holds a
    `.env`; else the checkout that this package lies in; else the working directory.
    """
    here, package = Path.cwd(), Path(__file__).parent.parent
    for folder in (here, *here.parents):
        if _is_checkout(folder):
            return folder
    return package if _is_checkout(package) and not (here / ".env").is_file() else here


def describe(settings: Settings, lang: str | None = None) -> list[tuple[str, str, str, str]]:
    """Return (VARIABLE, value, origin, description) for every setting, with secrets redacted."""
    rows = []
    for name in Settings.model_fields:
        value = getattr(settings, name)
        shown = "" if value is None else str(value).lower() if isinstance(value, bool) else redact(str(value))
        rows.append((name.upper(), shown, settings.origin(name), message(f"setting_{name}", lang)))
    return rows


def redact(text: str) -> str:
    """Return `text` with the passwords and tokens of its URLs replaced: `http://user:***@host`."""
    return re.sub(r"://([^:/@\s]+:)?\S*@", r"://\1***@", text)


_process: Settings | None = None


def get_settings() -> Settings:
    """Return the process's settings, loaded at the first call."""
    global _process
    if _process is None:
        _process = Settings.load()
    return _process


def start(root: Path | None = None, **overrides: Any) -> Settings:
    """Load the settings and make them the process's: environment, network, language, logging.

    Called first by every entry point (command line, notebook, service), before any hub library is
    imported.
    """
    global _process
    from rag_kit.network import apply_network, export, withdraw

    withdraw()  # of an earlier start, whose values would now look like the user's own
    _process = settings = Settings.load(root, **overrides)
    use_language(settings.rag_kit_lang)
    _apply_logging(settings)
    for name, value in settings._foreign.items():
        if name not in os.environ:
            export(name, value)
    for warning in (*settings.warnings, *apply_network(settings)):
        logger.warning(warning)
    return settings


def _apply_logging(settings: Settings) -> None:
    """Log to stderr: rag_kit at LOG_LEVEL; other libraries from WARNING on, INFO when debugging."""
    level = logging.DEBUG if settings.verbose else logging.getLevelNamesMapping()[settings.log_level]
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger().setLevel(logging.INFO if level == logging.DEBUG else max(level, logging.WARNING))
    logging.getLogger("rag_kit").setLevel(level)
    # It complains at import of kernels that nobody asked for, and of rounding that int8 consists of.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT still asks transformers under an old name, once for each adapter; nobody here can mend it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def _absolute(root: Path, value: str | Path) -> Path:
    return Path(os.path.abspath(root / Path(value).expanduser()))  # noqa: PTH100 - takes `..` out, keeps links


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "rag_kit" / "settings.py").is_file()


def _check_place(name: str, value: object, origin: str) -> None:
    """Refuse what a path cannot be on this system, before something is created under such a name."""
    text = str(value or "")
    told = {"name": name.upper(), "value": text.encode("unicode_escape").decode(), "origin": origin}
    if any(character < " " for character in text):
        raise SettingsError("path_control_character", **told)
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/]|\.{0,2}\\", text):
        raise SettingsError("path_of_windows", **(told | {"value": text, "system": platform.system()}))


def _problems(cls: type[Settings], error: ValidationError, given: dict[str, tuple[Any, str]]) -> str:
    """Return `DEVICE=gpu (.env line 3) → auto | cpu | cuda; …`, in no language."""
    schema, parts = cls.model_json_schema()["properties"], {}
    for name in (str(problem["loc"][0]) for problem in error.errors()):
        value, origin = given[name]
        parts[name] = f"{name.upper()}={redact(str(value))} ({origin}) → {_allowed(schema[name])}"
    return "; ".join(parts.values())


def _allowed(schema: dict[str, Any]) -> str:
    """Return what a JSON schema allows, as short as it can be said."""
    schema = schema.get("anyOf", [schema])[0]
    if "enum" in schema or "examples" in schema:
        return " | ".join(schema.get("enum", []) or schema["examples"])
    if schema["type"] == "boolean":
        return "true | false | 1 | 0 | yes | no | on | off"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([schema["type"], ", ".join(bounds)]).strip()
