-- depends: 0001.samples
-- What was pushed to Label Studio, what people were shown, and what they sent back.

CREATE TYPE task_state AS ENUM ('reserved', 'open', 'done', 'skipped', 'conflict', 'deleted', 'failed');
CREATE TYPE annotation_status AS ENUM (
    'pending', 'in_progress', 'completed', 'skipped', 'invalid', 'withdrawn'
);
CREATE TYPE conflict_resolution AS ENUM ('human_wins', 'crawler_wins', 'merged', 'pending_reflow');

CREATE TABLE projects (
    task_type task_type PRIMARY KEY,
    project_id integer NOT NULL UNIQUE,
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE projects IS 'Which Label Studio project serves which task type, as setup_projects left it.';

CREATE TABLE gold_references (
    gold_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sample_id uuid NOT NULL REFERENCES samples,
    task_type task_type NOT NULL,
    reference_text text,
    reference_segments jsonb,
    expected_score numeric(4, 3) NOT NULL CHECK (expected_score BETWEEN 0 AND 1),
    set_by text NOT NULL,
    set_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    unset_at timestamptz,
    CHECK (CASE task_type WHEN 'audio_segmentation' THEN reference_segments ELSE to_jsonb(reference_text) END IS NOT NULL)
);
COMMENT ON TABLE gold_references IS 'The truth for hidden gold. It lives here only: Label Studio never sees it.';
CREATE UNIQUE INDEX gold_references_one_in_force ON gold_references (sample_id, task_type) WHERE unset_at IS NULL;

CREATE TABLE tasks (
    task_key uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    sample_id uuid NOT NULL REFERENCES samples,
    task_type task_type NOT NULL,
    project_id integer NOT NULL,
    label_studio_task_id bigint,
    state task_state NOT NULL DEFAULT 'reserved',
    planned_overlap integer NOT NULL DEFAULT 1 CHECK (planned_overlap >= 1),
    gold_id bigint REFERENCES gold_references,
    problem text,
    in_progress_since timestamptz,
    reserved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    pushed_at timestamptz,
    closed_at timestamptz,
    run_id bigint,
    CHECK (state IN ('reserved', 'failed') OR label_studio_task_id IS NOT NULL)
);
COMMENT ON COLUMN tasks.task_key IS 'Made before the push and sent in the task''s meta: finds the task again after a crash.';
CREATE UNIQUE INDEX tasks_in_label_studio ON tasks (project_id, label_studio_task_id)
WHERE label_studio_task_id IS NOT NULL;
CREATE UNIQUE INDEX tasks_one_open ON tasks (sample_id, task_type) WHERE state IN ('reserved', 'open') AND gold_id IS NULL;
CREATE INDEX tasks_of_sample ON tasks (sample_id, task_type, state);
CREATE INDEX tasks_unfinished ON tasks (task_type, state) WHERE state IN ('reserved', 'open', 'skipped', 'conflict', 'failed');

CREATE TABLE task_showings (
    task_key uuid NOT NULL REFERENCES tasks,
    shown_since timestamptz NOT NULL DEFAULT clock_timestamp(),
    sync_version integer NOT NULL,
    transcript_version integer,
    translation_version integer,
    audio_file_md5 text,
    PRIMARY KEY (task_key, shown_since)
);
COMMENT ON TABLE task_showings IS 'Which version a task showed, and since when.';

ALTER TABLE sample_changes ADD CONSTRAINT sample_changes_task_key_fkey FOREIGN KEY (task_key) REFERENCES tasks;

CREATE TABLE annotators (
    annotator_id integer PRIMARY KEY CHECK (annotator_id > 0),
    label_studio_user_id integer NOT NULL UNIQUE,
    pseudonym text NOT NULL UNIQUE GENERATED ALWAYS AS (
        'annotator-' || lpad(annotator_id::text, greatest(3, length(annotator_id::text)), '0')
    ) STORED
);
COMMENT ON TABLE annotators IS 'People by pseudonym: names and addresses stay in Label Studio.';

CREATE TABLE submitted_annotations (
    annotation_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    label_studio_annotation_id bigint NOT NULL UNIQUE,
    task_key uuid NOT NULL REFERENCES tasks,
    annotator_id integer REFERENCES annotators,
    status annotation_status NOT NULL CHECK (status NOT IN ('pending', 'in_progress')),
    problem text,
    result jsonb NOT NULL,
    text text,
    segments jsonb,
    lead_time_seconds double precision,
    began_at timestamptz NOT NULL,
    submitted_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    pulled_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    shown_version integer,
    current_version integer,
    conflict_detected boolean NOT NULL DEFAULT false,
    conflict_kinds change_kind[] NOT NULL DEFAULT '{}',
    conflict_resolution conflict_resolution,
    resolved_at timestamptz,
    resolved_by text,
    run_id bigint,
    CHECK ((status = 'invalid') = (problem IS NOT NULL))
);
COMMENT ON COLUMN submitted_annotations.began_at IS 'created_at - lead_time, or the start of the draft if that is earlier.';
COMMENT ON COLUMN submitted_annotations.text IS 'What the person wrote, NFC, also when a conflict keeps it from becoming a revision.';
COMMENT ON COLUMN submitted_annotations.current_version IS 'The sample''s version when the conflict was decided.';
CREATE INDEX submitted_annotations_task ON submitted_annotations (task_key);
CREATE INDEX submitted_annotations_conflicts ON submitted_annotations (task_key) WHERE conflict_detected;

ALTER TABLE revisions ADD CONSTRAINT revisions_annotation_id_fkey
FOREIGN KEY (annotation_id) REFERENCES submitted_annotations;

CREATE TABLE pull_cursors (
    project_id integer PRIMARY KEY,
    read_until timestamptz NOT NULL,
    unsettled_xid text,
    tasks_max_id bigint NOT NULL DEFAULT 0,
    tasks_fingerprint text NOT NULL DEFAULT '0:0',
    annotations_max_id bigint NOT NULL DEFAULT 0,
    annotations_fingerprint text NOT NULL DEFAULT '0:0'
);
COMMENT ON TABLE pull_cursors IS
'read_until: everything in Label Studio that changed before it was pulled, but for what transactions from unsettled_xid on '
'wrote, which were open then (NULL: none were). The fingerprints (count:sum of ids up to '
'max_id) tell whether a row that was seen has gone.';

CREATE TABLE webhook_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL,
    project_id integer,
    label_studio_task_id bigint,
    label_studio_annotation_id bigint,
    pull_run_id bigint REFERENCES runs,
    pulled_at timestamptz
);
COMMENT ON TABLE webhook_events IS 'Nudges from Label Studio, and when the pull that each woke had finished.';
CREATE INDEX webhook_events_waiting ON webhook_events (received_at) WHERE pulled_at IS NULL;

GRANT SELECT, INSERT, UPDATE ON
projects, gold_references, tasks, annotators, submitted_annotations, pull_cursors, webhook_events
TO labelstation;
GRANT SELECT, INSERT ON task_showings TO labelstation;
