"""Any sequence of deliveries leaves what a model of a few lines says."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conftest import copied_database
from corpus import SmallCorpus
from station.local_services import LocalPostgres
from support import Connection, run_script, write_settings

KINDS = ("audio", "transcript", "translation")
IDS = ("a", "b", "c")
# What is delivered for one id: a content for each kind (texts may be absent), or nothing.
sample = st.none() | st.tuples(
    st.sampled_from("12"), st.none() | st.sampled_from("12"), st.none() | st.sampled_from("12")
)
delivery = st.fixed_dictionaries(dict.fromkeys(IDS, sample))


@dataclass
class ModelSample:
    """One sample as it should be in data_factory."""

    version: int = 1
    removed: bool = False
    delivered: dict[str, str] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=lambda: {"transcript": [], "translation": []})
    changes: list[tuple[int, str]] = field(default_factory=list)

    def deliver(self, contents: dict[str, str | None], *, new: bool) -> None:
        kinds = [kind for kind, content in contents.items() if content and content != self.delivered.get(kind)]
        if self.removed:
            kinds.append("return")
        if kinds and not new:
            self.version += 1
        self.changes += [(self.version, kind) for kind in kinds]
        for kind in kinds:
            if kind in self.texts:
                self.texts[kind].append(str(contents[kind]))
        self.delivered |= {kind: content for kind, content in contents.items() if content}
        self.removed = False

    def remove(self) -> None:
        if not self.removed:
            self.version += 1
            self.changes.append((self.version, "removal"))
            self.removed = True


def stored(db: Connection) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for sample_id, external_id, version, removed in db.execute(
        "SELECT sample_id, external_id, sync_version, removed_at IS NOT NULL FROM samples"
    ).fetchall():
        texts = {
            kind: [
                row[0]
                for row in db.execute(
                    "SELECT text FROM revisions WHERE sample_id = %s AND kind = %s::revision_kind ORDER BY version",
                    [sample_id, kind],
                ).fetchall()
            ]
            for kind in ("transcript", "translation")
        }
        changes = db.execute(
            "SELECT sync_version, kind::text FROM sample_changes WHERE sample_id = %s", [sample_id]
        ).fetchall()
        result[external_id] = (version, removed, texts, sorted(changes))
    return result


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(deliveries=st.lists(delivery, min_size=2, max_size=4))
def test_any_sequence_of_deliveries_leaves_what_the_model_says(
    postgres: LocalPostgres,
    schema_template: str,
    deliveries: list[dict[str, tuple[str, str | None, str | None] | None]],
) -> None:
    model: dict[str, ModelSample] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        copied_database(postgres, schema_template, "ingest_model") as name,
        psycopg.connect(postgres.dsn("labelstation", name), autocommit=True) as db,
    ):
        corpus = SmallCorpus(Path(folder) / "raw")
        env_file = write_settings(
            Path(folder) / "settings",
            DATA_FACTORY_DSN=postgres.dsn("labelstation", name),
            RAW_DIR=str(corpus.folder),
        )
        for contents_by_id in deliveries:
            corpus.lines.clear()
            for external_id, contents in contents_by_id.items():
                if contents is None:
                    if external_id in model:
                        model[external_id].remove()
                    continue
                audio, transcript, translation = contents
                corpus.add(external_id, transcript, translation)
                corpus.set_audio(external_id, audio)
                new = external_id not in model
                model.setdefault(external_id, ModelSample()).deliver(dict(zip(KINDS, contents, strict=True)), new=new)
            corpus.write()
            done = run_script("ingest", "--remove-missing", env_file=env_file)
            assert done.returncode == 0, done.stderr
            assert stored(db) == {
                external_id: (sample.version, sample.removed, sample.texts, sorted(sample.changes))
                for external_id, sample in model.items()
            }
