"""The table of task types. Everything else that depends on the task type derives from it."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskType:
    """One kind of work for annotators.

    Attributes:
        name: value of `--task-type` and of the database's enum `task_type`.
        aliases: other spellings that `--task-type` accepts.
        title: title of the Label Studio project.
        template: file below `label_studio_templates/`.
        project_setting: setting that names an existing Label Studio project.
        control: `from_name` of the control whose value is the work's result.
        revision_kind: what a finished annotation makes a revision of.
        data_fields: fields of a task's `data`.
        needs_audio: whether a sample without audio can have such a task.
        needs_texts: texts that a sample must have for such a task.
        folder: folder below the reviewed data.
        document: file in a sample's folder that holds the result.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    template: str
    project_setting: str
    control: str
    revision_kind: str
    data_fields: tuple[str, ...]
    needs_audio: bool
    needs_texts: tuple[str, ...]
    folder: str
    document: str


TASK_TYPES = {
    task_type.name: task_type
    for task_type in (
        TaskType(
            name="transcript_correction",
            aliases=("transcript_verification",),
            title="Transcript Correction",
            template="transcript_correction.xml",
            project_setting="LS_PROJECT_TRANSCRIPT",
            control="corrected_transcript",
            revision_kind="transcript",
            data_fields=("audio", "text", "sample_id"),
            needs_audio=True,
            needs_texts=("transcript",),
            folder="transcript_verification",
            document="transcript.json",
        ),
        TaskType(
            name="translation_review",
            aliases=(),
            title="Translation Review",
            template="translation_review.xml",
            project_setting="LS_PROJECT_TRANSLATION",
            control="corrected_translation",
            revision_kind="translation",
            data_fields=("source_text", "translation", "sample_id"),
            needs_audio=False,
            needs_texts=("transcript", "translation"),
            folder="translation_review",
            document="translation.json",
        ),
        TaskType(
            name="audio_segmentation",
            aliases=(),
            title="Audio Segmentation",
            template="audio_segmentation.xml",
            project_setting="LS_PROJECT_SEGMENTATION",
            control="segment_labels",
            revision_kind="segmentation",
            data_fields=("audio", "text", "sample_id"),
            needs_audio=True,
            needs_texts=("transcript",),
            folder="audio_segmentation",
            document="segments.json",
        ),
    )
}


def task_type_argument(value: str) -> TaskType:
    """Look up the value of `--task-type`, by name or alias."""
    for task_type in TASK_TYPES.values():
        if value == task_type.name or value in task_type.aliases:
            return task_type
    raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(TASK_TYPES)}")
