"""Which samples get a task, and what the task shows, on a real Label Studio."""

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from conftest import RunningLabelStudio, Station
from faulty_proxy import Answer, Exchange, Held, faulty_proxy, never_carried_out
from station.label_studio import LabelStudio
from station.local_annotator import Annotator
from station.settings import Settings
from support import Connection, add_sample, change_audio, change_text, eventually, finish, launch_script, text_result

TRANSCRIPT = "transcript_correction"
TRANSLATION = "translation_review"
SEGMENTATION = "audio_segmentation"


@pytest.fixture
def station(shared_station: Station) -> Station:
    shared_station.clear()
    return shared_station


@pytest.fixture(scope="module")
def personal_access_token(running_label_studio: RunningLabelStudio) -> str:
    admin = running_label_studio.account
    address = running_label_studio.address
    person = Annotator.with_token(address, admin.token).invite("pat@labelstation.example", "correct horse")
    return str(person.call("POST", "/api/token/")["token"])


def push(station: Station, *arguments: str, task_type: str = TRANSCRIPT, expect: int = 0, **env: str) -> dict[str, Any]:
    return station.run("push", "--task-type", task_type, *arguments, expect=expect, **env)


def add_task(
    db: Connection, sample_id: str, state: str, task_type: str = TRANSCRIPT, *, gold: bool = False, task_id: int = 0
) -> None:
    """A task as earlier runs left it."""
    db.execute(
        """
        WITH gold AS (
            SELECT set_gold_standard(%(sample)s, p_task_type => %(type)s) AS gold_id WHERE %(gold)s
        ), made AS (
            INSERT INTO tasks (sample_id, task_type, project_id, state, label_studio_task_id, gold_id)
            VALUES (%(sample)s, %(type)s, 1, %(state)s, %(id)s, (SELECT gold_id FROM gold))
            RETURNING task_key
        )
        INSERT INTO task_showings (task_key, sync_version, audio_file_md5)
        SELECT made.task_key, s.sync_version, s.audio_file_md5
        FROM made INNER JOIN samples AS s ON s.sample_id = %(sample)s
        """,
        {"sample": sample_id, "type": task_type, "state": state, "id": task_id or None, "gold": gold},
    )


def everything(station: Station) -> list[object]:
    """All that a push could change."""
    tables = ("samples", "tasks", "task_showings", "runs", "revisions", "sample_changes")
    return [
        *(station.db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables),
        station.label_studio_db.execute("SELECT count(*) FROM task").fetchone(),
    ]


def data_of(station: Station, sample_id: str, task_type: str = TRANSCRIPT) -> dict[str, Any]:
    """What Label Studio shows for a sample."""
    row = station.label_studio_db.execute(
        "SELECT data FROM task WHERE id = %s", [station.tasks(task_type)[sample_id]]
    ).fetchone()
    assert row is not None
    data: dict[str, Any] = row[0]
    return data


def in_order(station: Station) -> list[str]:
    """Samples in the order in which annotators get them."""
    tasks = station.tasks()
    return sorted(tasks, key=lambda sample_id: tasks[sample_id])


def test_what_is_urgent_comes_first_then_what_came_first_up_to_the_limit(station: Station) -> None:
    plain, urgent, also_plain, also_urgent = (
        add_sample(station.db, name, priority=priority) for name, priority in (("d", 0), ("c", 5), ("b", 0), ("a", 5))
    )
    first = push(station, "--limit", "3")
    assert in_order(station) == [urgent, also_urgent, plain]
    assert (first["pushed"], first["left_out"]) == (3, {"over the limit": 1})
    assert push(station)["pushed"] == 1
    assert in_order(station)[-1] == also_plain


@pytest.fixture
def one_of_each(station: Station) -> dict[str, int]:
    """Samples that get no task, a different number for each reason, and two that do; the reasons."""
    db = station.db
    numbers = {
        "removed": 1, "locked": 2, "open": 3, "done": 4, "skipped": 5, "conflict": 6, "refused": 7,
        "no audio": 8, "no transcript": 9,
    }  # fmt: skip
    for reason, number in numbers.items():
        for index in range(number):
            name = f"{reason}-{index}"
            # Blank is as good as missing.
            transcript = "x" if reason != "no transcript" else "\n " if index % 2 else None
            sample_id = add_sample(db, name, transcript, audio=reason != "no audio")
            if reason == "removed":
                db.execute("UPDATE samples SET removed_at = now() WHERE sample_id = %s", [sample_id])
            elif reason == "locked":
                db.execute("SELECT lock_sample_for_annotation(%s, 'somebody')", [sample_id])
            elif reason in ("open", "done", "skipped", "conflict", "refused"):
                state = "failed" if reason == "refused" else reason
                add_task(db, sample_id, state, task_id=100 * number + index + 1)
    for name in ("waits", "waits too"):
        add_sample(db, name, None if name == "waits" else "x")
    change_text(db, add_sample(db, "refused before it changed"), "transcript", "y")
    sample_id = add_sample(db, "deleted in Label Studio")
    add_task(db, sample_id, "deleted", task_id=5000)
    # One that waits for its transcript stays out; three wait.
    return {**numbers, "no transcript": numbers["no transcript"] + 1}


def test_a_dry_run_changes_nothing_and_tells_what_the_push_will_tell(
    station: Station, one_of_each: dict[str, int]
) -> None:
    before = everything(station)
    foretold = push(station, "--dry-run")
    assert everything(station) == before
    done = push(station)
    assert foretold["left_out"] == done["left_out"] == one_of_each
    assert foretold["would_push"] == done["pushed"] == len(station.tasks()) == 3
    row = station.db.execute("SELECT exit_code, counts FROM runs").fetchone()
    assert row == (0, {key: done[key] for key in ("pushed", "recovered", "failed", "twins_removed", "left_out")})


def test_a_translation_review_needs_both_texts_and_no_audio(station: Station) -> None:
    sample_id = add_sample(station.db, "article", "xin chào", "hello", audio=False)
    add_sample(station.db, "no translation", "xin chào", None)
    add_sample(station.db, "no transcript", None, "hello")
    done = push(station, task_type=TRANSLATION)
    assert done["left_out"] == {"no translation": 1, "no transcript": 1}
    assert data_of(station, sample_id, TRANSLATION) == {
        "source_text": "xin chào", "translation": "hello", "sample_id": sample_id,
    }  # fmt: skip


def test_finishing_one_task_type_does_not_end_the_others(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    waiting = [TRANSCRIPT, TRANSLATION, SEGMENTATION]
    while waiting:
        task_type = waiting.pop(0)
        assert push(station, task_type=task_type)["pushed"] == 1
        assert push(station, "--dry-run", task_type=task_type)["left_out"] == {"open": 1}
        if waiting:
            assert push(station, "--dry-run", task_type=waiting[0])["left_out"] == {"locked": 1}
        station.db.execute("UPDATE tasks SET state = 'done' WHERE task_type = %s", [task_type])
        station.db.execute("SELECT unlock_sample(%s)", [sample_id])
        assert push(station, "--dry-run", task_type=task_type)["left_out"] == {"done": 1}


def test_a_finished_review_stays_finished_unless_its_audio_is_replaced(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    add_task(station.db, sample_id, "done", task_id=1)
    change_text(station.db, sample_id, "transcript", "a new subtitle")
    assert push(station)["left_out"] == {"done": 1}
    change_audio(station.db, sample_id)
    assert push(station)["pushed"] == 1


def test_hidden_gold_is_not_production(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    add_task(station.db, sample_id, "done", gold=True, task_id=1)
    add_task(station.db, sample_id, "open", gold=True, task_id=2)
    assert push(station)["pushed"] == 1
    assert push(station)["left_out"] == {"open": 1}


def test_the_ledger_notes_what_is_shown_also_when_a_text_changes_at_that_moment(station: Station) -> None:
    quiet, changing = add_sample(station.db, "quiet", "một"), add_sample(station.db, "changing", "one")
    with psycopg.connect(station.db.info.dsn, autocommit=True) as crawler:
        with crawler.transaction():
            change_text(crawler, changing, "transcript", "two")
            running = launch_script("push", "--task-type", TRANSCRIPT, env_file=station.env_file)
            eventually(
                lambda: (
                    station.db.execute(
                        "SELECT FROM pg_stat_activity WHERE application_name = 'labelstation-push'"
                        " AND wait_event_type = 'Lock'"
                    ).fetchone()
                    is not None
                ),
                "the push waits for the crawler",
            )
        finish(running)
    for sample_id, text in ((quiet, "một"), (changing, "two")):
        row = station.db.execute(
            """
            SELECT shown.sync_version = s.sync_version, r.text, shown.audio_file_md5 = s.audio_file_md5,
                translation.text, s.audio_path
            FROM task_showings AS shown
            INNER JOIN tasks USING (task_key)
            INNER JOIN samples AS s USING (sample_id)
            INNER JOIN transcript_revisions AS r
                ON r.sample_id = s.sample_id AND r.version = shown.transcript_version
            INNER JOIN translation_revisions AS translation
                ON translation.sample_id = s.sample_id AND translation.version = shown.translation_version
            WHERE s.sample_id = %s
            """,
            [sample_id],
        ).fetchone()
        data = data_of(station, sample_id)
        assert row is not None
        assert row == (True, text, True, "hello everyone", row[4])
        assert data["text"] == text
        assert data["audio"].endswith(row[4])


def noted_text(station: Station, sample_id: str) -> str:
    """The transcript that the ledger says is shown."""
    row = station.db.execute(
        """
        SELECT r.text
        FROM task_showings AS shown
        INNER JOIN tasks AS t USING (task_key)
        INNER JOIN transcript_revisions AS r
            ON r.sample_id = t.sample_id AND r.version = shown.transcript_version
        WHERE t.sample_id = %s
        ORDER BY shown.shown_since DESC LIMIT 1
        """,
        [sample_id],
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_a_text_that_changes_while_tasks_are_sent_is_shown_as_it_is_noted(station: Station) -> None:
    sample_id = add_sample(station.db, "a", "one")

    def change_and_break(exchange: Exchange) -> Answer | None:
        change_text(station.db, sample_id, "transcript", "two")
        return never_carried_out(exchange)

    with faulty_proxy(station.address) as proxy:
        proxy.fates = [change_and_break]
        push(station, LABEL_STUDIO_URL=proxy.address)
    assert data_of(station, sample_id)["text"] == noted_text(station, sample_id) == "one"


def test_audio_addresses_are_those_of_the_audio_server(station: Station) -> None:
    names = {
        "plain": "audio/plain.wav",
        "Bài hát số 1": "audio/B%C3%A0i%20h%C3%A1t%20s%E1%BB%91%201.wav",
        "50% #1? a&b+c": "audio/50%25%20%231%3F%20a%26b%2Bc.wav",
    }
    for server in ("http://audio.example:8081/", "https://example.org/clips", ""):
        station.clear()
        samples = {add_sample(station.db, name): path for name, path in names.items()}
        push(station, AUDIO_SERVER_URL=server)
        for sample_id, path in samples.items():
            assert data_of(station, sample_id)["audio"] == f"{server.rstrip('/')}/{path}"


def test_texts_arrive_as_they_are(station: Station) -> None:
    texts = [
        """Nói "xin chào" và 'tạm biệt', \\n không phải dòng mới""",
        "dòng một\n\tdòng hai\r\nrồi 😀👩‍👩‍👧 hết\u2028",
        "<script>alert('&amp;')</script> $text {{text}} %s",
        "Tiếng Việt " * 9000,
    ]
    samples = {add_sample(station.db, f"s{index}", text, text[::-1]): text for index, text in enumerate(texts)}
    push(station)
    for sample_id, text in samples.items():
        assert data_of(station, sample_id)["text"] == text
    station.db.execute("UPDATE tasks SET state = 'done'")
    station.db.execute("SELECT unlock_sample(sample_id) FROM samples")
    push(station, task_type=TRANSLATION)
    for sample_id, text in samples.items():
        data = data_of(station, sample_id, TRANSLATION)
        assert (data["source_text"], data["translation"]) == (text, text[::-1])


def test_one_task_that_label_studio_refuses_does_not_stop_the_rest(station: Station) -> None:
    samples = [add_sample(station.db, f"s{index:02}") for index in range(40)]
    bad = samples[17]
    with faulty_proxy(station.address) as proxy:
        # The audio goes away between the reservation and the import.
        proxy.fates = [never_carried_out, never_carried_out]
        push(station, expect=75, LABEL_STUDIO_URL=proxy.address)
        station.db.execute("UPDATE samples SET audio_path = NULL, audio_file_md5 = NULL WHERE sample_id = %s", [bad])
        before = proxy.imports()
        done = push(station, expect=3, LABEL_STUDIO_URL=proxy.address)
        assert proxy.imports() - before < 14
    assert (done["pushed"], done["recovered"], done["failed"]) == (0, 39, 1)
    assert bad in done["stderr"]
    assert "data['audio']=None" in done["stderr"]
    assert in_order(station) == [sample_id for sample_id in samples if sample_id != bad]
    row = station.db.execute(
        "SELECT t.state::text, t.problem LIKE '%%audio%%', s.locked_by FROM tasks AS t"
        " INNER JOIN samples AS s USING (sample_id) WHERE sample_id = %s",
        [bad],
    ).fetchone()
    assert row == ("failed", True, None)
    assert push(station)["left_out"] == {"open": 39, "refused": 1}
    station.db.execute("UPDATE samples SET audio_path = 'a.wav', audio_file_md5 = md5('') WHERE sample_id = %s", [bad])
    assert push(station)["left_out"] == {"open": 39, "refused": 1}
    change_audio(station.db, bad)
    assert push(station)["pushed"] == 1


def test_an_interrupted_push_is_finished_with_what_is_true_then(station: Station) -> None:
    removed, changed = add_sample(station.db, "removed"), add_sample(station.db, "changed", "one")
    with faulty_proxy(station.address) as proxy:
        proxy.fates = [never_carried_out, never_carried_out]
        push(station, expect=75, LABEL_STUDIO_URL=proxy.address)
    station.db.execute("UPDATE samples SET removed_at = now() WHERE sample_id = %s", [removed])
    change_text(station.db, changed, "transcript", "two")
    assert push(station, "--dry-run")["would_recover"] == 2
    assert push(station)["recovered"] == 1
    assert set(station.tasks()) == {changed}
    assert data_of(station, changed)["text"] == noted_text(station, changed) == "two"
    assert station.db.execute("SELECT external_id FROM samples WHERE locked_by IS NULL").fetchall() == [("removed",)]


def test_many_samples_go_in_batches_and_large_ones_in_smaller_ones(station: Station) -> None:
    station.db.execute(
        """
        WITH added AS (
            INSERT INTO samples (external_id, source_type, audio_path, audio_file_md5)
            SELECT 's' || n, 'manual_upload', n || '.wav', md5(n::text) FROM generate_series(1, 2150) AS n
            RETURNING sample_id
        )
        INSERT INTO revisions (sample_id, kind, version, sync_version, text, source)
        SELECT sample_id, 'transcript', 1, 1, 'text', 'crawler' FROM added
        """
    )
    with faulty_proxy(station.address) as proxy:
        assert push(station, LABEL_STUDIO_URL=proxy.address)["pushed"] == 2150
        assert proxy.imports() == 3
        assert len(station.tasks()) == 2150
        sizes: list[int] = []
        proxy.tamper = lambda exchange: sizes.append(len(exchange.body))
        for index in range(5):
            add_sample(station.db, f"large {index}", "dài " * 1_000_000)
        assert push(station, LABEL_STUDIO_URL=proxy.address)["pushed"] == 5
        assert sum(sizes) > 25_000_000
        assert max(sizes) <= 16 * 1024 * 1024


def test_the_setting_names_the_project_before_the_one_that_was_set_up(station: Station) -> None:
    config = station.admin.call("GET", f"/api/projects/{station.projects[TRANSCRIPT]}/")["label_config"]
    other = station.admin.call("POST", "/api/projects/", {"title": "Another", "label_config": config})["id"]
    interrupted = add_sample(station.db, "interrupted")
    with faulty_proxy(station.address) as proxy:
        proxy.fates = [never_carried_out, never_carried_out]
        push(station, expect=75, LABEL_STUDIO_URL=proxy.address)
    new = add_sample(station.db, "new")
    done = push(station, LS_PROJECT_TRANSCRIPT=str(other))
    assert (done["project"], done["pushed"], done["recovered"]) == (other, 1, 1)
    assert station.tasks() == {}
    rows = station.label_studio_db.execute("SELECT project_id, data ->> 'sample_id' FROM task ORDER BY id").fetchall()
    assert rows == [(other, interrupted), (other, new)]
    assert station.db.execute("SELECT DISTINCT project_id FROM tasks").fetchall() == [(other,)]
    station.admin.call("DELETE", f"/api/projects/{other}/")


def test_a_project_for_other_work_is_refused_before_anything_is_reserved(station: Station) -> None:
    add_sample(station.db, "a")
    project = station.projects[TRANSLATION]
    done = push(station, expect=78, LS_PROJECT_TRANSCRIPT=str(project))
    assert (
        f"project {project} shows source_text, translation, which transcript_correction tasks do not"
        in (done["stderr"])
    )
    assert station.db.execute("SELECT FROM tasks").fetchone() is None


def test_a_pull_that_is_faster_than_the_push_keeps_its_result(station: Station) -> None:
    sample_id = add_sample(station.db, "a")
    held = Held(carried_out_first=True)
    with faulty_proxy(station.address) as proxy:
        proxy.fates = [held]
        running = launch_script(
            "push", "--task-type", TRANSCRIPT, env_file=station.env_file, LABEL_STUDIO_URL=proxy.address
        )
        assert held.arrived.wait(60)
        station.admin.annotate(station.tasks()[sample_id], text_result("corrected_transcript", "sửa rồi"))
        station.run("pull", "--task-type", TRANSCRIPT)
        held.released.set()
        finish(running)
    assert station.db.execute("SELECT state::text FROM tasks").fetchall() == [("done",)]


def test_a_personal_access_token_works_and_is_renewed_when_it_has_expired(
    station: Station, personal_access_token: str
) -> None:
    expired: list[str] = []

    def expire(exchange: Exchange) -> None:
        """Label Studio gets an access token that it does not take, once."""
        if exchange.path.startswith("/api/projects/") and not expired:
            expired.append(exchange.headers["Authorization"])
            exchange.headers["Authorization"] += "x"

    sample_id = add_sample(station.db, "a")
    with faulty_proxy(station.address) as proxy:
        proxy.tamper = expire
        push(station, LABEL_STUDIO_URL=proxy.address, LABEL_STUDIO_API_KEY=personal_access_token)
    assert expired[0].startswith("Bearer ")
    assert [path for _method, path in proxy.requests].count("/api/token/refresh") == 2
    assert set(station.tasks()) == {sample_id}


def test_an_access_token_is_renewed_before_it_expires(
    station: Station, personal_access_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(station.address) as proxy:
        label_studio = LabelStudio(Settings(label_studio_url=proxy.address, label_studio_api_key=personal_access_token))
        for _request in range(2):
            assert label_studio.whoami() == "pat@labelstation.example"
        paths = [path for _method, path in proxy.requests]
        assert paths == ["/api/token/refresh", "/api/current-user/whoami", "/api/current-user/whoami"]
        later = time.monotonic() + 299
        monkeypatch.setattr(time, "monotonic", lambda: later)
        label_studio.whoami()
        assert [path for _method, path in proxy.requests][3:] == ["/api/token/refresh", "/api/current-user/whoami"]


def test_a_password_for_the_same_host_in_netrc_does_not_replace_the_token(
    station: Station, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine {urlsplit(station.address).hostname} login somebody password else\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    label_studio = LabelStudio(Settings(label_studio_url=station.address, label_studio_api_key=station.token))
    assert label_studio.whoami().startswith("admin@")
