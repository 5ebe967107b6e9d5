"""A thin client of Label Studio's HTTP API. Reading in bulk is done from its database instead, see contract.py."""

import base64
import binascii
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests

from station.errors import ExitCode, SettingError, StationError, UnavailableError
from station.settings import Settings

_CONNECT_SECONDS = 10
# Access tokens live 300 s; renew in time for a request that takes long to send.
_RENEW_BEFORE_SECONDS = 60


class NoAnswerError(UnavailableError):
    """The request was sent but its answer did not come: Label Studio may have carried it out all the same."""


class RefusedError(StationError):
    """Label Studio understood the request and refused it.

    Attributes:
        status: the HTTP status.
        detail: what Label Studio said.
    """

    # Where no caller knows better: the account lacks a right, or something is not there.
    exit_code = ExitCode.SETTING

    def __init__(self, message: str, status: int, detail: str) -> None:
        """Keep what Label Studio said beside the message."""
        super().__init__(message)
        self.status = status
        self.detail = detail


class LabelStudio:
    """Label Studio's API as one account sees it."""

    def __init__(self, settings: Settings) -> None:
        """Read address and token; nothing is sent yet.

        Raises:
            SettingError: there is no token.
        """
        self.address = settings.label_studio_url
        self._token = settings.require("label_studio_api_key")
        self._timeout = (_CONNECT_SECONDS, settings.label_studio_timeout_seconds)
        self._session = requests.Session()
        self._renewable = _is_personal_access_token(self._token)
        # gunicorn drops idle connections after two seconds: the next request on one breaks, though nothing is wrong.
        self._session.headers["Connection"] = "close"
        self._access_expires = 0.0
        self._authorization = f"Token {self._token}"
        # A function and not a header, which an entry in ~/.netrc would replace.
        self._session.auth = self._authorize

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._authorization
        return request

    def request(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        parameters: Mapping[str, str | int] | None = None,
    ) -> Any:
        """Send one request and return the decoded answer.

        Raises:
            UnavailableError: Label Studio could not be reached.
            NoAnswerError: the request may have been carried out, but no answer came, or one of 5xx.
            SettingError: the token is wrong, or this is not a Label Studio.
            RefusedError: it answered 4xx.
        """
        if self._renewable and time.monotonic() > self._access_expires:
            self._renew_access()
        answer = self._send(method, path, body, parameters)
        if self._renewable and answer.status_code == requests.codes.unauthorized:
            # Expired all the same: this machine slept, or Label Studio's clock is another. Nothing was carried out.
            self._renew_access()
            answer = self._send(method, path, body, parameters)
        if answer.status_code == requests.codes.unauthorized:
            raise SettingError(
                f"LABEL_STUDIO_API_KEY: Label Studio at {self.address} does not accept it: {_told(answer)}"
            )
        if answer.status_code >= requests.codes.server_error:
            # Perhaps a proxy that waited in vain, or a failure after the tasks were made.
            raise NoAnswerError(
                f"Label Studio at {self.address} failed with {answer.status_code} on {method} {path}: its log says why"
            )
        if answer.is_redirect:
            raise SettingError(
                f"LABEL_STUDIO_URL: {self.address}{path} redirects to {answer.headers['Location']}: name the address "
                "that it leads to"
            )
        if not answer.ok:
            raise RefusedError(
                f"Label Studio refused {method} {path} with {answer.status_code}: {_told(answer)}",
                answer.status_code,
                _told(answer),
            )
        if not answer.content:
            return None
        try:
            return answer.json()
        except requests.JSONDecodeError:
            raise SettingError(
                f"LABEL_STUDIO_URL: {self.address} answers {method} {path} with something other than JSON: "
                "is it Label Studio?"
            ) from None

    def _send(
        self, method: str, path: str, body: object, parameters: Mapping[str, str | int] | None
    ) -> requests.Response:
        # Compact, and with Vietnamese as itself: half the bytes of the default.
        data = None if body is None else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            return self._session.request(
                method,
                self.address + path,
                data=data,
                params=parameters,
                headers={"Content-Type": "application/json"} if data is not None else {},
                timeout=self._timeout,
                allow_redirects=False,
            )
        except requests.ConnectTimeout as error:
            raise self._unreachable(error) from None
        except requests.ReadTimeout:
            raise NoAnswerError(
                f"Label Studio at {self.address} did not answer {method} {path} within {self._timeout[1]:g} s: "
                "is it overloaded, or LABEL_STUDIO_TIMEOUT_SECONDS too short?"
            ) from None
        except requests.exceptions.SSLError as error:
            raise SettingError(f"LABEL_STUDIO_URL: no secure connection to {self.address}: {error}") from None
        except requests.ConnectionError as error:
            if "NewConnectionError" in repr(error) or "NameResolutionError" in repr(error):
                raise self._unreachable(error) from None
            raise NoAnswerError(
                f"the connection to Label Studio at {self.address} broke during {method} {path}: is it running?"
            ) from None
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
            raise NoAnswerError(
                f"the connection to Label Studio at {self.address} broke during {method} {path}: is it running?"
            ) from None
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise SettingError(f"LABEL_STUDIO_URL: {self.address}: {error}") from None

    def _unreachable(self, error: Exception) -> UnavailableError:
        reason = "no connection within 10 s" if isinstance(error, requests.ConnectTimeout) else "nothing answers there"
        return UnavailableError(f"Label Studio at {self.address} cannot be reached: {reason}; is it running?")

    def _renew_access(self) -> None:
        answer = self._send("POST", "/api/token/refresh", {"refresh": self._token}, None)
        if answer.status_code >= requests.codes.server_error:
            raise UnavailableError(
                f"Label Studio at {self.address} failed with {answer.status_code} on the renewal of the access token: "
                "its log says why"
            )
        try:
            access = answer.json()["access"]
            expires = _payload(access)["exp"] - _payload(access)["iat"]
        except (requests.JSONDecodeError, KeyError, TypeError, ValueError):
            raise SettingError(
                f"LABEL_STUDIO_API_KEY: Label Studio at {self.address} does not accept this personal access token: "
                f"{_told(answer)}"
            ) from None
        self._authorization = f"Bearer {access}"
        self._access_expires = time.monotonic() + max(1, expires - _RENEW_BEFORE_SECONDS)

    def version(self) -> str:
        """Its version, such as 1.23.2.

        Raises:
            SettingError: what answers there is not Label Studio.
        """
        try:
            return str(self.request("GET", "/api/version")["release"])
        except (RefusedError, KeyError, TypeError):
            raise SettingError(
                f"LABEL_STUDIO_URL: what answers at {self.address} is not Label Studio: correct the address"
            ) from None

    def whoami(self) -> str:
        """E-mail address of the token's account."""
        return str(self.request("GET", "/api/current-user/whoami")["email"])

    def project(self, project_id: int) -> dict[str, Any]:
        """One project.

        Raises:
            SettingError: there is none with this id.
        """
        try:
            result: dict[str, Any] = self.request("GET", f"/api/projects/{project_id}/")
        except RefusedError as error:
            if error.status == requests.codes.not_found:
                raise SettingError(
                    f"Label Studio at {self.address} has no project {project_id} that this account may see: it was "
                    "deleted, or LS_PROJECT_… or LABEL_STUDIO_URL is wrong"
                ) from None
            raise
        return result

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, object]]) -> list[int]:
        """Make tasks, at most 1,000 a call.

        Args:
            project_id: the project.
            tasks: `{"data": …, "meta": …}` each.

        Returns:
            ids of the new tasks, in the order of `tasks`.

        Raises:
            NoAnswerError: the tasks may or may not exist now.
            RefusedError: none of them exists.
        """
        answer = self.request(
            "POST",
            f"/api/projects/{project_id}/import",
            body=tasks,
            parameters={"return_task_ids": "true", "commit_to_project": "true"},
        )
        return [int(task_id) for task_id in answer["task_ids"]]

    def delete_tasks(self, project_id: int, task_ids: Sequence[int]) -> None:
        """Delete tasks with everything that belongs to them."""
        self.request(
            "POST",
            "/api/dm/actions",
            parameters={"id": "delete_tasks", "project": project_id},
            body={"selectedItems": {"all": False, "included": list(task_ids)}},
        )


def _payload(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return decoded


def _is_personal_access_token(token: str) -> bool:
    """Personal access tokens are JWTs; legacy tokens are 40 hexadecimal digits."""
    try:
        return token.count(".") == 2 and _payload(token).get("token_type") == "refresh"
    except (ValueError, binascii.Error):
        return False


def _told(answer: requests.Response) -> str:
    """What Label Studio gave as the reason, in one line."""
    try:
        content = answer.json()
    except requests.JSONDecodeError:
        return answer.reason or str(answer.status_code)
    if isinstance(content, dict):
        reasons = content.get("validation_errors") or content.get("detail") or content
        return json.dumps(reasons, ensure_ascii=False)[:500] if not isinstance(reasons, str) else reasons
    return json.dumps(content, ensure_ascii=False)[:500]
