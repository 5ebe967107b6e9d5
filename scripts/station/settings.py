"""The settings of all scripts: read once, validated once."""

import io
import os
from pathlib import Path
from typing import Annotated, Self

import psycopg.conninfo
from dotenv.parser import parse_stream
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from station.errors import SettingError


def _web_address(value: str) -> str:
    if not value.startswith(("http://", "https://")) or len(value.split("://", 1)[1].strip("/")) == 0:
        raise ValueError("is not an address such as http://localhost:8085")
    return value.rstrip("/")


def _audio_address(value: str) -> str:
    # Empty: audio is served below the address that people open, so that task URLs are relative.
    return _web_address(value) if value else ""


def _secret(value: str) -> str:
    # What can stand in an HTTP header.
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("has characters that no access token has: copy it again")
    return value


def _dsn(value: str) -> str:
    try:
        ports = str(psycopg.conninfo.conninfo_to_dict(value).get("port", "")).split(",")
        usable = all(port.isdigit() for port in ports if port)
    except psycopg.ProgrammingError:
        usable = False
    if not usable:
        # What libpq says would quote the part that it stumbles over, which may be of the password.
        raise ValueError(
            "is not a PostgreSQL connection string such as host=localhost dbname=data_factory user=labelstation "
            "(in a URL, special characters of the password are written as %XX)"
        )
    return value


WebAddress = Annotated[str, AfterValidator(_web_address)]
AudioAddress = Annotated[str, AfterValidator(_audio_address)]
Dsn = Annotated[str, AfterValidator(_dsn)]
Secret = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_secret)]


class Settings(BaseModel):
    """All settings. `.env.example` explains each; the names there are these in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    label_studio_url: WebAddress = "http://localhost:8085"
    label_studio_proxy_url: WebAddress | None = None
    label_studio_api_key: Secret | None = None
    label_studio_timeout_seconds: float = Field(default=300, gt=0, le=3600)
    label_studio_dsn: Dsn | None = None
    label_studio_owner_dsn: Dsn | None = None
    ls_project_transcript: int | None = Field(default=None, ge=1)
    ls_project_translation: int | None = Field(default=None, ge=1)
    ls_project_segmentation: int | None = Field(default=None, ge=1)
    data_factory_dsn: Dsn | None = None
    data_factory_owner_dsn: Dsn | None = None
    audio_server_url: AudioAddress = "http://localhost:8081"
    raw_dir: Path = Path("data/raw")
    reviewed_dir: Path = Path("data/reviewed")
    sync_interval_minutes: int = Field(default=5, ge=1, le=1440)
    gold_sample_ratio: float = Field(default=0.05, ge=0, le=0.5)
    skip_gold_validation: bool = False

    @model_validator(mode="after")
    def _one_project_each(self) -> Self:
        taken: dict[int, str] = {}
        for name in ("ls_project_transcript", "ls_project_translation", "ls_project_segmentation"):
            project = getattr(self, name)
            if project in taken:
                raise ValueError(f"{taken[project]} and {name.upper()} name the same project: give each its own")
            if project is not None:
                taken[project] = name.upper()
        return self

    def require(self, name: str) -> str:
        """The value of a setting that this script cannot do without.

        Raises:
            SettingError: it is not set.
        """
        value = getattr(self, name)
        if value is None:
            raise SettingError(f"{name.upper()} is not set: .env.example says what it is for")
        return str(value)


def load_settings(env_file: Path) -> Settings:
    """Read the settings: environment first, then systemd credentials, then the env file.

    Args:
        env_file: a file of NAME=value lines. Only the default `.env` may be missing.

    Raises:
        SettingError: names the setting, what is wrong with its value, and where it was read.
    """
    values: dict[str, str] = {}
    origins: dict[str, str] = {}
    credentials = Path(os.environ.get("CREDENTIALS_DIRECTORY", os.devnull))
    from_file = _read_env_file(env_file)
    for field in Settings.model_fields:
        name = field.upper()
        if name in os.environ:
            values[field], origins[field] = os.environ[name], "the environment"
        elif (credentials / name).is_file():
            values[field] = _read(credentials / name).strip()
            origins[field] = f"the credential {name}"
        elif name in from_file:
            values[field], origins[field] = from_file[name], str(env_file)
        # `NAME=` in an env file leaves the setting out, except where empty is a value of its own.
        if values.get(field) == "" and field != "audio_server_url":
            del values[field]
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            "".join(f"{str(field).upper()} from {origins[str(field)]}: " for field in fault["loc"][:1])
            + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors(include_url=False)
        )
        raise SettingError(f"wrong setting: {faults}") from None


def _read_env_file(env_file: Path) -> dict[str, str]:
    if not env_file.is_file():
        if env_file == Path(".env"):
            return {}
        raise SettingError(f"there is no settings file {env_file}: copy .env.example and edit it")
    result = {}
    for binding in parse_stream(io.StringIO(_read(env_file))):
        if binding.error:
            raise SettingError(f"{env_file}, line {binding.original.line}: is not NAME=value: correct that line")
        if binding.key is not None:
            result[binding.key] = binding.value or ""
    return result


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SettingError(f"cannot read the settings in {file}: it is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise SettingError(f"cannot read the settings in {file}: {error.strerror}") from None
