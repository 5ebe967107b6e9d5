-- What refers to tasks and annotations from outside lets go of them, so that the step can be applied again.
UPDATE revisions SET annotation_id = NULL WHERE annotation_id IS NOT NULL;
UPDATE sample_changes SET task_key = NULL WHERE task_key IS NOT NULL;
UPDATE samples SET locked_by = NULL, locked_at = NULL WHERE locked_by = 'label_studio';
DROP TABLE webhook_events;
DROP TABLE pull_cursors;
ALTER TABLE revisions DROP CONSTRAINT revisions_annotation_id_fkey;
DROP TABLE submitted_annotations;
DROP TABLE annotators;
ALTER TABLE sample_changes DROP CONSTRAINT sample_changes_task_key_fkey;
DROP TABLE task_showings;
DROP TABLE tasks;
DROP TABLE gold_references;
DROP TABLE projects;
DROP TYPE conflict_resolution;
DROP TYPE annotation_status;
DROP TYPE task_state;
