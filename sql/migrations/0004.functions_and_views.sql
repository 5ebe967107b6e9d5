-- depends: 0003.exports_and_scores
-- The functions and views that people and scripts call by name.

CREATE FUNCTION relevant_changes(p_task_type task_type) RETURNS change_kind[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE p_task_type
    WHEN 'translation_review' THEN ARRAY['audio', 'transcript', 'translation', 'removal']::change_kind[]
    ELSE ARRAY['audio', 'transcript', 'removal']::change_kind[]
END;
COMMENT ON FUNCTION relevant_changes IS 'Changes that make work begun before them a conflict.';

CREATE FUNCTION lock_sample_for_annotation(
    p_sample_id uuid,
    p_holder text DEFAULT 'label_studio',
    OUT success boolean,
    OUT sync_version integer,
    OUT message text
)
RETURNS SETOF record LANGUAGE plpgsql ROWS 1 AS $$
DECLARE
    sample samples;
BEGIN
    IF coalesce(p_holder, '') = '' THEN
        RAISE null_value_not_allowed USING MESSAGE = 'a lock needs a holder';
    END IF;
    UPDATE samples AS s
    SET locked_by = p_holder, locked_at = coalesce(s.locked_at, clock_timestamp())
    WHERE s.sample_id = p_sample_id AND s.removed_at IS NULL AND coalesce(s.locked_by, p_holder) = p_holder
    RETURNING * INTO sample;
    success := FOUND;
    IF NOT success THEN
        SELECT * INTO sample FROM samples AS s WHERE s.sample_id = p_sample_id;
    END IF;
    sync_version := sample.sync_version;
    message := CASE
        WHEN success THEN 'locked'
        WHEN sample.sample_id IS NULL THEN 'no such sample'
        WHEN sample.removed_at IS NOT NULL THEN 'the sample was removed'
        ELSE format('locked by %s since %s', sample.locked_by, sample.locked_at)
    END;
    RETURN NEXT;
END
$$;
COMMENT ON FUNCTION lock_sample_for_annotation IS
'Locks a sample for its holder; the same holder may lock it again. One row: success, the sample''s version, why not.';

CREATE FUNCTION unlock_sample(
    p_sample_id uuid,
    p_increment_version boolean DEFAULT false,
    p_holder text DEFAULT 'label_studio'
)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    new_version integer;
BEGIN
    UPDATE samples AS s
    SET
        locked_by = NULL,
        locked_at = NULL,
        sync_version = s.sync_version + coalesce(p_increment_version, false)::integer
    WHERE s.sample_id = p_sample_id AND s.locked_by = p_holder
    RETURNING s.sync_version INTO new_version;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_increment_version THEN
        INSERT INTO sample_changes (sample_id, sync_version, kind, source)
        VALUES (p_sample_id, new_version, 'unspecified', 'operator');
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION unlock_sample IS
'Releases the holder''s lock and says whether there was one. With p_increment_version the sample''s version rises.';

CREATE FUNCTION check_annotation_conflict(
    p_sample_id uuid,
    p_expected_version integer,
    p_task_type task_type DEFAULT NULL,
    OUT has_conflict boolean,
    OUT expected_version integer,
    OUT current_version integer,
    OUT changes change_kind[],
    OUT message text
)
RETURNS SETOF record LANGUAGE plpgsql STABLE ROWS 1 AS $$
BEGIN
    expected_version := p_expected_version;
    SELECT s.sync_version INTO current_version FROM samples AS s WHERE s.sample_id = p_sample_id;
    SELECT coalesce(array_agg(DISTINCT c.kind), '{}') INTO changes
    FROM sample_changes AS c
    WHERE c.sample_id = p_sample_id
        AND c.sync_version > p_expected_version
        AND (p_task_type IS NULL OR c.kind = ANY (relevant_changes(p_task_type)));
    has_conflict := current_version IS NULL
        OR p_expected_version IS NULL
        OR p_expected_version > current_version
        OR (p_task_type IS NULL AND p_expected_version < current_version)
        OR changes <> '{}';
    message := CASE
        WHEN current_version IS NULL THEN 'no such sample'
        WHEN p_expected_version IS NULL THEN 'the expected version is not known'
        WHEN p_expected_version > current_version THEN 'the sample never had the expected version'
        WHEN has_conflict THEN format(
            'changed from version %s to %s: %s', p_expected_version, current_version, array_to_string(changes, ', ')
        )
        ELSE 'no conflict'
    END;
    RETURN NEXT;
END
$$;
COMMENT ON FUNCTION check_annotation_conflict IS
'Whether a sample changed since a version; with a task type, whether it changed in a way that matters to that work. '
'What cannot be known counts as a conflict.';

CREATE FUNCTION create_conflict_sample(p_sample_id uuid, p_reason text) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    original samples;
    copy_id uuid;
BEGIN
    -- The lock makes two callers number their copies one after the other.
    SELECT * INTO original FROM samples WHERE sample_id = p_sample_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE no_data_found USING MESSAGE = format('sample %s does not exist', p_sample_id);
    END IF;
    INSERT INTO samples (
        external_id, source_type, audio_path, audio_file_md5, audio_size_bytes, audio_modified_ns,
        duration_seconds, language_tags, captured_at, url, title, channel_id, upload_date, acoustic_meta,
        subtitle_type, transcript_language, priority, cs_ratio, metadata, dvc_commit_hash,
        parent_sample_id, conflict_reason
    )
    SELECT
        original.external_id || '#conflict-' || 1 + count(*), original.source_type, original.audio_path,
        original.audio_file_md5, original.audio_size_bytes, original.audio_modified_ns,
        original.duration_seconds, original.language_tags, original.captured_at, original.url,
        original.title, original.channel_id, original.upload_date, original.acoustic_meta,
        original.subtitle_type, original.transcript_language, original.priority + 10, original.cs_ratio,
        original.metadata, original.dvc_commit_hash, original.sample_id, p_reason
    FROM samples
    WHERE parent_sample_id = p_sample_id
    RETURNING sample_id INTO copy_id;

    INSERT INTO revisions (
        sample_id, kind, version, sync_version, text, segments, language, source, created_by, audio_file_md5
    )
    SELECT DISTINCT ON (kind)
        copy_id, kind, 1, 1, text, segments, language, 'resolution', p_reason, audio_file_md5
    FROM revisions
    WHERE sample_id = p_sample_id AND kind IN ('transcript', 'translation') AND withdrawn_at IS NULL
    ORDER BY kind, version DESC;

    INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, dvc_revision, source)
    SELECT copy_id, 1, kind::text::change_kind, md5(text), original.dvc_commit_hash, 'resolution'::change_source
    FROM revisions
    WHERE sample_id = copy_id
    UNION ALL
    SELECT copy_id, 1, 'audio', original.audio_file_md5, original.dvc_commit_hash, 'resolution'
    WHERE original.audio_file_md5 IS NOT NULL;
    RETURN copy_id;
END
$$;
COMMENT ON FUNCTION create_conflict_sample IS
'Copies a sample with its current texts into a new one with raised priority, which remembers where it came from.';

CREATE FUNCTION set_gold_standard(
    p_sample_id uuid,
    p_expected_score double precision DEFAULT 0.95,
    p_set_by text DEFAULT current_user,
    p_task_type task_type DEFAULT 'transcript_correction',
    p_reference_text text DEFAULT NULL,
    p_reference_segments jsonb DEFAULT NULL
)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    wanted_kind CONSTANT revision_kind := CASE p_task_type
        WHEN 'transcript_correction' THEN 'transcript'
        WHEN 'translation_review' THEN 'translation'
        ELSE 'segmentation'
    END;
    reference revisions;
    new_gold_id bigint;
BEGIN
    IF p_expected_score IS NULL OR p_expected_score NOT BETWEEN 0 AND 1 THEN
        RAISE check_violation USING MESSAGE = format('an expected score lies between 0 and 1, not %s', p_expected_score);
    END IF;
    PERFORM FROM samples WHERE sample_id = p_sample_id AND removed_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RAISE no_data_found USING MESSAGE = format('sample %s does not exist or was removed', p_sample_id);
    END IF;
    IF p_reference_text IS NULL AND p_reference_segments IS NULL THEN
        SELECT * INTO reference FROM revisions
        WHERE sample_id = p_sample_id AND kind = wanted_kind AND withdrawn_at IS NULL
        ORDER BY version DESC
        LIMIT 1;
        IF NOT FOUND THEN
            RAISE no_data_found USING MESSAGE = format(
                'sample %s has no %s to take as the reference', p_sample_id, wanted_kind
            );
        END IF;
        p_reference_text := reference.text;
        p_reference_segments := reference.segments;
    END IF;
    UPDATE gold_references SET unset_at = clock_timestamp()
    WHERE sample_id = p_sample_id AND task_type = p_task_type AND unset_at IS NULL;
    INSERT INTO gold_references (sample_id, task_type, reference_text, reference_segments, expected_score, set_by)
    VALUES (
        p_sample_id, p_task_type, normalize(p_reference_text), p_reference_segments, p_expected_score,
        coalesce(p_set_by, current_user)
    )
    RETURNING gold_id INTO new_gold_id;
    RETURN new_gold_id;
END
$$;
COMMENT ON FUNCTION set_gold_standard IS
'Makes a sample gold for a task type. The reference is the given one, else the sample''s current text.';

CREATE VIEW annotations AS
SELECT
    a.annotation_id,
    t.sample_id,
    t.task_type,
    a.status,
    a.conflict_detected,
    a.conflict_kinds,
    a.conflict_resolution,
    a.resolved_at,
    a.resolved_by,
    a.shown_version,
    a.current_version,
    a.text,
    a.segments,
    a.result,
    a.problem,
    w.pseudonym AS annotator,
    a.lead_time_seconds,
    a.began_at,
    a.submitted_at,
    a.changed_at,
    a.pulled_at,
    t.task_key,
    t.project_id,
    t.label_studio_task_id,
    a.label_studio_annotation_id
FROM submitted_annotations AS a
INNER JOIN tasks AS t USING (task_key)
LEFT JOIN annotators AS w USING (annotator_id)
UNION ALL
SELECT
    NULL, t.sample_id, t.task_type,
    CASE WHEN t.in_progress_since IS NULL THEN 'pending' ELSE 'in_progress' END::annotation_status,
    false, '{}', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    t.in_progress_since, NULL, NULL, NULL,
    t.task_key, t.project_id, t.label_studio_task_id, NULL
FROM tasks AS t
WHERE t.state IN ('reserved', 'open')
    AND NOT EXISTS (
        SELECT FROM submitted_annotations AS a WHERE a.task_key = t.task_key AND a.status <> 'withdrawn'
    );
COMMENT ON VIEW annotations IS
'Every annotation that was sent in, and a pending or in_progress one for each task that still waits for its first.';

CREATE VIEW v_sync_status AS
SELECT
    s.sample_id,
    s.external_id,
    s.sync_version,
    CASE WHEN s.locked_by IS NULL THEN 'unlocked' ELSE 'locked' END AS lock_status,
    s.locked_by,
    s.locked_at,
    s.dvc_commit_hash,
    s.audio_file_md5,
    s.removed_at,
    changed.changed_at AS last_changed_at,
    changed.source AS last_changed_by
FROM samples AS s
LEFT JOIN LATERAL (
    SELECT c.changed_at, c.source
    FROM sample_changes AS c
    WHERE c.sample_id = s.sample_id
    ORDER BY c.sync_version DESC
    LIMIT 1
) AS changed ON true;
COMMENT ON VIEW v_sync_status IS 'For each sample: its version, who holds its lock, and its last change.';

CREATE VIEW v_gold_standard_samples AS
SELECT
    g.gold_id,
    g.sample_id,
    s.external_id,
    g.task_type,
    g.expected_score,
    g.reference_text,
    g.reference_segments,
    g.set_by,
    g.set_at
FROM gold_references AS g
INNER JOIN samples AS s USING (sample_id)
WHERE g.unset_at IS NULL;
COMMENT ON VIEW v_gold_standard_samples IS 'The gold references in force.';

CREATE VIEW v_annotator_accuracy AS
WITH latest_score AS (
    SELECT DISTINCT ON (gold_id, annotation_id) gold_id, annotation_id, score
    FROM gold_scores
    ORDER BY gold_id, annotation_id, scored_at DESC
)
SELECT
    w.pseudonym AS annotator,
    t.task_type,
    count(*) AS total_gold_annotations,
    round(avg(g.expected_score), 3) AS average_expected_score,
    count(l.score) AS scored_gold_annotations,
    avg(l.score) AS average_measured_score,
    round(100.0 * count(*) FILTER (WHERE a.status = 'completed') / count(*), 1) AS completion_rate_percent
FROM submitted_annotations AS a
INNER JOIN tasks AS t USING (task_key)
INNER JOIN annotators AS w USING (annotator_id)
-- Work that was done before the reference was set may be where the reference comes from: it proves nothing.
INNER JOIN gold_references AS g
    ON g.sample_id = t.sample_id AND g.task_type = t.task_type
    AND (g.gold_id = t.gold_id OR (t.gold_id IS NULL AND g.unset_at IS NULL AND a.submitted_at > g.set_at))
LEFT JOIN latest_score AS l ON l.gold_id = g.gold_id AND l.annotation_id = a.annotation_id
WHERE a.status <> 'withdrawn'
GROUP BY w.pseudonym, t.task_type;
COMMENT ON VIEW v_annotator_accuracy IS
'Annotators on gold. average_expected_score is what the samples were set to; average_measured_score is what the people '
'reached, and NULL until it was measured.';

GRANT SELECT ON annotations, v_sync_status, v_gold_standard_samples, v_annotator_accuracy TO labelstation;
