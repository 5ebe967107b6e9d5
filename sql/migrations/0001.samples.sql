-- Samples, the ledger of every change of their content, and the texts themselves.

CREATE TYPE task_type AS ENUM ('transcript_correction', 'translation_review', 'audio_segmentation');
CREATE TYPE change_kind AS ENUM (
    'audio', 'transcript', 'translation', 'segmentation', 'removal', 'return', 'unspecified'
);
CREATE TYPE change_source AS ENUM ('crawler', 'human', 'resolution', 'operator');
CREATE TYPE revision_kind AS ENUM ('transcript', 'translation', 'segmentation');

CREATE TABLE runs (
    run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    script text NOT NULL,
    task_type task_type,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    exit_code integer,
    git_revision text,
    dvc_revision text,
    counts jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE runs IS
'One row for each run of a script that writes; finished_at stays NULL when it was killed. Rows are never deleted, so '
'columns run_id elsewhere go without a foreign key, whose checks would be a good part of every bulk write.';
CREATE INDEX runs_latest ON runs (script, task_type, started_at DESC);

CREATE VIEW sync_runs AS
SELECT run_id, started_at, finished_at, exit_code, git_revision, dvc_revision, counts
FROM runs
WHERE script IN ('ingest', 'sync');
COMMENT ON VIEW sync_runs IS 'Which revision of the data repository each ingest brought in.';

CREATE TABLE samples (
    sample_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    arrival bigint GENERATED ALWAYS AS IDENTITY,
    external_id text NOT NULL UNIQUE CHECK (external_id <> ''),
    source_type text NOT NULL CHECK (
        source_type IN ('youtube_with_transcript', 'youtube_without_transcript', 'substack', 'manual_upload')
    ),
    audio_path text,
    audio_file_md5 text CHECK (audio_file_md5 ~ '^[0-9a-f]{32}$'),
    audio_size_bytes bigint,
    audio_modified_ns bigint,
    duration_seconds double precision CHECK (duration_seconds >= 0),
    language_tags text[] NOT NULL DEFAULT '{}',
    captured_at date,
    url text,
    title text,
    channel_id text,
    upload_date date,
    acoustic_meta jsonb,
    subtitle_type text,
    transcript_language text,
    priority integer NOT NULL DEFAULT 0,
    cs_ratio double precision,
    metadata jsonb NOT NULL DEFAULT '{}',
    transcript_md5 text,
    translation_md5 text,
    delivery_md5 text,
    dvc_commit_hash text,
    sync_version integer NOT NULL DEFAULT 1,
    locked_by text,
    locked_at timestamptz,
    parent_sample_id uuid REFERENCES samples,
    conflict_reason text,
    removed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK ((audio_path IS NULL) = (audio_file_md5 IS NULL)),
    CHECK ((locked_by IS NULL) = (locked_at IS NULL))
);
COMMENT ON COLUMN samples.arrival IS 'Order of arrival: what waits longest is pushed first within a priority.';
COMMENT ON COLUMN samples.transcript_md5 IS 'md5 of the transcript file''s content as last delivered by the crawler.';
COMMENT ON COLUMN samples.delivery_md5 IS 'md5 of everything last delivered for the sample: equal means that nothing changed.';
COMMENT ON COLUMN samples.dvc_commit_hash IS 'Git commit of the data repository that brought in the current content.';
COMMENT ON COLUMN samples.sync_version IS 'Raised by every change of content; each has its row in sample_changes.';
CREATE INDEX samples_queue ON samples (priority DESC, arrival) WHERE removed_at IS NULL AND locked_by IS NULL;
CREATE INDEX samples_locked ON samples (locked_at) WHERE locked_by IS NOT NULL;
CREATE INDEX samples_parent ON samples (parent_sample_id) WHERE parent_sample_id IS NOT NULL;

CREATE TABLE sample_changes (
    sample_id uuid NOT NULL REFERENCES samples,
    sync_version integer NOT NULL,
    kind change_kind NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    content_hash text,
    dvc_revision text,
    source change_source NOT NULL,
    task_key uuid,
    run_id bigint,
    PRIMARY KEY (sample_id, sync_version, kind)
);
COMMENT ON TABLE sample_changes IS 'The change ledger. Append-only: the scripts'' role may neither update nor delete.';
COMMENT ON COLUMN sample_changes.sync_version IS 'The sample''s version from this change on.';
COMMENT ON COLUMN sample_changes.task_key IS 'The task whose annotation made the change; NULL when no person at a task did.';

CREATE TABLE revisions (
    revision_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sample_id uuid NOT NULL REFERENCES samples,
    kind revision_kind NOT NULL,
    version integer NOT NULL,
    sync_version integer NOT NULL,
    text text,
    segments jsonb,
    language text,
    source change_source NOT NULL,
    annotation_id uuid,
    created_by text,
    audio_file_md5 text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    withdrawn_at timestamptz,
    UNIQUE (sample_id, kind, version),
    CHECK (CASE kind WHEN 'segmentation' THEN segments ELSE to_jsonb(text) END IS NOT NULL)
);
COMMENT ON TABLE revisions IS
'Every text a sample ever had. The current one is the highest version that is not withdrawn.';
COMMENT ON COLUMN revisions.audio_file_md5 IS 'The audio that the person heard (human and resolution only).';
CREATE INDEX revisions_current ON revisions (sample_id, kind, version DESC) WHERE withdrawn_at IS NULL;
CREATE INDEX revisions_annotation ON revisions (annotation_id) WHERE annotation_id IS NOT NULL;

-- A row that comes without a version gets the next one, under the sample's row lock, together with
-- its entry in the change ledger. Bulk writers that hold the lock already give both numbers themselves.
CREATE FUNCTION number_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE samples
    SET sync_version = samples.sync_version + 1, updated_at = now()
    WHERE sample_id = NEW.sample_id
    RETURNING sync_version INTO NEW.sync_version;
    IF NOT FOUND THEN
        RAISE foreign_key_violation USING MESSAGE = format('sample %s does not exist', NEW.sample_id);
    END IF;
    SELECT coalesce(max(version), 0) + 1 INTO NEW.version
    FROM revisions
    WHERE sample_id = NEW.sample_id AND kind = NEW.kind;
    INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, source)
    VALUES (
        NEW.sample_id, NEW.sync_version, NEW.kind::text::change_kind,
        md5(coalesce(NEW.text, NEW.segments::text)), NEW.source
    );
    RETURN NEW;
END
$$;
CREATE TRIGGER number_revision BEFORE INSERT ON revisions
FOR EACH ROW WHEN (NEW.version IS NULL) EXECUTE FUNCTION number_revision();

CREATE VIEW transcript_revisions AS SELECT * FROM revisions WHERE kind = 'transcript' WITH CHECK OPTION;
CREATE VIEW translation_revisions AS SELECT * FROM revisions WHERE kind = 'translation' WITH CHECK OPTION;
CREATE VIEW segmentation_revisions AS SELECT * FROM revisions WHERE kind = 'segmentation' WITH CHECK OPTION;
ALTER VIEW transcript_revisions ALTER COLUMN kind SET DEFAULT 'transcript';
ALTER VIEW translation_revisions ALTER COLUMN kind SET DEFAULT 'translation';
ALTER VIEW segmentation_revisions ALTER COLUMN kind SET DEFAULT 'segmentation';

GRANT SELECT, INSERT, UPDATE ON runs, samples, revisions TO labelstation;
GRANT SELECT, INSERT ON sample_changes TO labelstation;
GRANT SELECT ON sync_runs TO labelstation;
GRANT SELECT, INSERT ON transcript_revisions, translation_revisions, segmentation_revisions TO labelstation;
