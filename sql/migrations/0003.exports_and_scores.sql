-- depends: 0002.tasks
-- What was written for training, and how annotators did on hidden gold.

CREATE TABLE exports (
    destination text NOT NULL,
    task_type task_type NOT NULL,
    sample_id uuid NOT NULL REFERENCES samples,
    revision_id bigint NOT NULL REFERENCES revisions,
    audio_file_md5 text,
    entry jsonb NOT NULL,
    exported_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id bigint,
    PRIMARY KEY (destination, task_type, sample_id)
);
COMMENT ON TABLE exports IS 'Which revision of a sample lies in which folder. A newer revision is exported again.';
COMMENT ON COLUMN exports.entry IS 'The sample''s line in manifest.jsonl.';

CREATE TABLE gold_exposures (
    gold_id bigint NOT NULL REFERENCES gold_references,
    task_key uuid NOT NULL REFERENCES tasks,
    annotator_id integer NOT NULL REFERENCES annotators,
    exposed_at timestamptz NOT NULL,
    PRIMARY KEY (gold_id, task_key, annotator_id)
);
COMMENT ON TABLE gold_exposures IS 'Who saw which gold item, and when.';

CREATE TABLE gold_scores (
    gold_id bigint NOT NULL REFERENCES gold_references,
    annotation_id uuid NOT NULL REFERENCES submitted_annotations,
    scorer text NOT NULL,
    score double precision NOT NULL CHECK (score BETWEEN 0 AND 1),
    measures jsonb NOT NULL,
    scored_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (gold_id, annotation_id, scorer)
);
COMMENT ON COLUMN gold_scores.scorer IS 'Name and version of the normaliser and measure, so that scores can be recomputed.';
COMMENT ON COLUMN gold_scores.measures IS 'The raw figures behind the score: error rates, counts.';

GRANT SELECT, INSERT, UPDATE, DELETE ON exports TO labelstation;
GRANT SELECT, INSERT, UPDATE ON gold_exposures, gold_scores TO labelstation;
