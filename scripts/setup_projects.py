#!/usr/bin/env python3
"""Make the three Label Studio projects, or bring them to what label_studio_templates/ says."""

import argparse
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from station import cli, contract
from station.database import Connection, connect, connect_data_factory, exclusive, project_ids
from station.errors import ExitCode, PersonNeededError, SettingError
from station.label_studio import LabelStudio, RefusedError
from station.settings import load_settings
from station.task_types import TASK_TYPES, TaskType

TEMPLATES = Path(__file__).resolve().parent.parent / "label_studio_templates"
# Kept as they are here; `maximum_annotations` is not among them, because changing it resets every task's overlap.
SETTINGS: dict[str, object] = {
    "show_skip_button": True,
    "show_collab_predictions": False,
    "show_annotation_history": False,
    "sampling": "Sequential sampling",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(__doc__ or "")
    cli.add_task_type(options, required=False)
    cli.add_dry_run(options)
    options.add_argument(
        "--templates", type=Path, default=TEMPLATES, metavar="DIR", help="folder of the labelling interfaces"
    )
    return options


def main(options: argparse.Namespace) -> ExitCode:
    """Check every template before the first project is touched, then make or update each."""
    settings = load_settings(options.env_file)
    label_studio = LabelStudio(settings)
    wanted: list[TaskType] = [options.task_type] if options.task_type else list(TASK_TYPES.values())
    templates = {task_type.name: read_template(options.templates / task_type.template) for task_type in wanted}
    with (
        connect_data_factory(settings, "setup-projects") as data_factory,
        connect(settings, "label_studio_dsn", "setup-projects") as label_studio_db,
        exclusive(data_factory, "setup_projects"),
    ):
        contract.check(label_studio_db)
        for task_type in wanted:
            validate(label_studio, task_type, templates[task_type.name])
        known = project_ids(data_factory, settings)
        existing = {
            task_type.name: find_project(label_studio, task_type, known.get(task_type.name)) for task_type in wanted
        }
        changes = {
            task_type.name: differences(existing[task_type.name], task_type, templates[task_type.name])
            for task_type in wanted
        }
        for task_type in wanted:
            project = existing[task_type.name]
            if project is not None:
                contract.check_same(label_studio_db, label_studio, project["id"])
                if "label_config" in changes[task_type.name]:
                    refuse_orphans(label_studio_db, project["id"], task_type, templates[task_type.name])
        result: dict[str, object] = {}
        lines = []
        for task_type in wanted:
            entry = carry_out(
                label_studio, data_factory, task_type, existing[task_type.name], changes[task_type.name], options
            )
            result[task_type.name] = entry
            changed = f" ({', '.join(entry['changed'])})" if entry["outcome"] == "updated" else ""
            lines.append(f"{task_type.name}: project {entry['project'] or '-'} {entry['outcome']}{changed}")
    cli.print_result(options, result, lines)
    return ExitCode.DONE


def read_template(file: Path) -> str:
    """The text of a labelling interface.

    Raises:
        SettingError: it is not there or is no XML.
    """
    try:
        text = file.read_text(encoding="utf-8")
        ET.fromstring(text)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read the template {file}: {error}") from None
    except ET.ParseError as error:
        raise SettingError(f"the template {file} is not XML: {error}") from None
    return text


def validate(label_studio: LabelStudio, task_type: TaskType, template: str) -> None:
    """Let Label Studio itself check a template, and see that it has the control whose value is the result."""
    if task_type.control not in controls(template):
        raise SettingError(f"the template {task_type.template} has no control named {task_type.control}")
    # Label Studio takes a field that no task has, and shows an error to whoever opens a task.
    read = {element.get("value", "")[1:] for element in ET.fromstring(template).iter() if is_field(element)}
    if unknown := sorted(read - set(task_type.data_fields)):
        raise SettingError(f"the template {task_type.template} reads {', '.join(unknown)}, which tasks do not have")
    try:
        label_studio.request("POST", "/api/projects/validate/", body={"label_config": template})
    except RefusedError as error:
        raise SettingError(f"Label Studio refuses the template {task_type.template}: {error.detail}") from None


def is_field(element: ET.Element) -> bool:
    """Whether an element shows a field of a task's data."""
    return element.get("value", "").startswith("$")


def marker(task_type: TaskType) -> str:
    """What a project's description says, by which it is found again if its id was never recorded."""
    return f"Managed by labelstation: {task_type.name}"


def find_project(label_studio: LabelStudio, task_type: TaskType, known_id: int | None) -> dict[str, Any] | None:
    """The project of a task type, if there is one."""
    if known_id is not None:
        return label_studio.project(known_id)
    page: int | None = 1
    while page is not None:
        answer = label_studio.request("GET", "/api/projects/", parameters={"page": page, "page_size": 100})
        for project in answer["results"]:
            if project["description"] == marker(task_type):
                return label_studio.project(project["id"])
        page = page + 1 if answer.get("next") else None
    return None


def differences(project: dict[str, Any] | None, task_type: TaskType, template: str) -> dict[str, object]:
    """What has to be sent to Label Studio."""
    wanted: dict[str, object] = {
        "title": task_type.title,
        "description": marker(task_type),
        "label_config": template,
        # Text that is right as it stands counts as empty: without this nobody could submit it untouched.
        "enable_empty_annotation": task_type.revision_kind != "segmentation",
        **SETTINGS,
    }
    if project is None:
        return {**wanted, "maximum_annotations": 1}
    found = {name: project.get(name) for name in wanted}
    if ET.canonicalize(found["label_config"], strip_text=True) == ET.canonicalize(template, strip_text=True):
        found["label_config"] = template
    return {name: value for name, value in wanted.items() if found[name] != value}


def controls(template: str) -> dict[str, tuple[str, str, set[str]]]:
    """Controls of a labelling interface: name → (tag, toName, values that annotations made with it can hold)."""
    return {
        element.attrib["name"]: (element.tag.lower(), element.attrib["toName"], set(offered(element)))
        for element in ET.fromstring(template).iter()
        if "toName" in element.attrib and "name" in element.attrib
    }


def offered(control: ET.Element) -> Iterator[str]:
    """What a control's labels or choices are stored as: by their alias, if they have one."""
    for child in control.iter():
        if child.tag in ("Label", "Choice"):
            yield child.get("alias") or child.get("value") or ""


def refuse_orphans(label_studio_db: Connection, project_id: int, task_type: TaskType, template: str) -> None:
    """Refuse a template in which existing annotations would lose their control or their label.

    Label Studio itself accepts a renamed control with 200.

    Raises:
        PersonNeededError: names what would be lost.
    """
    used = label_studio_db.execute(
        """
        SELECT part ->> 'from_name', part ->> 'to_name', lower(part ->> 'type'), chosen.value, count(DISTINCT a.id)
        FROM task_completion AS a
        CROSS JOIN LATERAL jsonb_path_query(a.result, '$[*] ? (exists(@.from_name))') AS part
        LEFT JOIN LATERAL (
            SELECT value #>> '{}' AS value FROM jsonb_path_query(part, '$.value.*[*]') AS value
            WHERE part ->> 'type' IN ('labels', 'choices') AND jsonb_typeof(value) = 'string'
        ) AS chosen ON true
        WHERE a.project_id = %s
        GROUP BY 1, 2, 3, 4
        ORDER BY 1, 4
        """,
        [project_id],
    ).fetchall()
    available = controls(template)
    lost = []
    for from_name, to_name, kind, value, number in used:
        tag, to_now, values = available.get(from_name, ("", "", set()))
        if (tag, to_now) != (kind, to_name):
            lost.append(f"control {from_name} ({kind} of {to_name}, {number} annotations)")
        elif value is not None and value not in values:
            lost.append(f"{value!r} of {from_name} ({number} annotations)")
    if lost:
        raise PersonNeededError(
            f"the template {task_type.template} would orphan existing annotations of project {project_id}: "
            f"{', '.join(dict.fromkeys(lost))}; keep these in the template, or use a new project"
        )


def carry_out(
    label_studio: LabelStudio,
    data_factory: Connection,
    task_type: TaskType,
    project: dict[str, Any] | None,
    changes: dict[str, object],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Make or update one project and record which it is."""
    if options.dry_run:
        outcome = "to be created" if project is None else "to be updated" if changes else "unchanged"
        return {"project": project and project["id"], "outcome": outcome, "changed": sorted(changes)}
    if project is None:
        outcome = "created"
        project = label_studio.request("POST", "/api/projects/", body=changes)
    elif changes:
        outcome = "updated"
        label_studio.request("PATCH", f"/api/projects/{project['id']}/", body=changes)
    else:
        outcome = "unchanged"
    data_factory.execute(
        """
        INSERT INTO projects AS p (task_type, project_id) VALUES (%s, %s)
        ON CONFLICT (task_type) DO UPDATE SET project_id = excluded.project_id, updated_at = now()
        WHERE p.project_id <> excluded.project_id
        """,
        [task_type.name, project["id"]],
    )
    return {
        "project": project["id"],
        "outcome": outcome,
        "changed": sorted(changes) if outcome == "updated" else [],
        "address": f"{label_studio.address}/projects/{project['id']}",
    }


if __name__ == "__main__":
    cli.run(parser(), main)
