"""A person at work in Label Studio through its API, as the demo, the tests and the benchmarks simulate one."""

import re
from dataclasses import dataclass, field
from typing import Any

import requests

from station.errors import UnavailableError

_SECONDS = 60


@dataclass
class Annotator:
    """An account's session in Label Studio.

    Attributes:
        address: of Label Studio.
        session: what is logged in.
    """

    address: str
    session: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        """Make each request on a connection of its own: gunicorn drops idle ones after two seconds."""
        self.session.headers["Connection"] = "close"

    @classmethod
    def with_token(cls, address: str, token: str) -> "Annotator":
        """The account that a legacy token belongs to."""
        person = cls(address)
        person.session.headers["Authorization"] = f"Token {token}"
        return person

    def invite(self, email: str, password: str) -> "Annotator":
        """Invite somebody, who signs up."""
        return Annotator(self.address).submit(self.call("GET", "/api/invite")["invite_url"], email, password)

    def log_in(self, email: str, password: str) -> "Annotator":
        """Log in through the form that people use."""
        return self.submit("/user/login/", email, password)

    def submit(self, path: str, email: str, password: str) -> "Annotator":
        """Send the form at a path, as a browser would."""
        page = self.address + path
        form = self.session.get(page, timeout=_SECONDS).text
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form)
        answer = self.session.post(
            page,
            data={"email": email, "password": password, "csrfmiddlewaretoken": token[1] if token else ""},
            headers={"Referer": page},
            timeout=_SECONDS,
        )
        if not answer.ok or "sessionid" not in self.session.cookies:
            raise UnavailableError(f"Label Studio does not let {email} in at {page}: {answer.status_code}")
        return self

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request to the API.

        Raises:
            requests.HTTPError: Label Studio refuses it.
        """
        headers = {"X-CSRFToken": self.session.cookies.get("csrftoken", ""), "Referer": self.address}
        answer = self.session.request(method, self.address + path, json=body, headers=headers, timeout=_SECONDS)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def next_task(self, project_id: int) -> dict[str, Any] | None:
        """The next task of the labelling stream, or None when there is no more for this person."""
        try:
            task: dict[str, Any] = self.call("GET", f"/api/projects/{project_id}/next")
        except requests.HTTPError as error:
            if error.response.status_code == requests.codes.not_found:
                return None
            raise
        return task

    def annotate(
        self, task_id: int, result: list[dict[str, Any]], *, lead_time: float = 0.001, skip: bool = False
    ) -> int:
        """Submit or skip; returns the annotation's id.

        Args:
            task_id: Label Studio's id of the task.
            result: what the labelling page would send.
            lead_time: seconds since the person opened the task.
            skip: skip instead of submit.
        """
        body = {"result": result, "lead_time": lead_time, "was_cancelled": skip}
        return int(self.call("POST", f"/api/tasks/{task_id}/annotations/", body)["id"])

    def change(self, annotation_id: int, result: list[dict[str, Any]]) -> None:
        """Submit again."""
        self.call("PATCH", f"/api/annotations/{annotation_id}/", {"result": result})

    def delete_annotation(self, annotation_id: int) -> None:
        """Delete an annotation."""
        self.call("DELETE", f"/api/annotations/{annotation_id}/")

    def delete_task(self, task_id: int) -> None:
        """Delete a task."""
        self.call("DELETE", f"/api/tasks/{task_id}/")
