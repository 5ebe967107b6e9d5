"""Whatever happens to a push, each sample ends up with exactly one task, and the ledger knows which."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from conftest import RunningLabelStudio, Station
from faulty_proxy import (
    Answer,
    Exchange,
    FaultyProxy,
    Held,
    answer_lost,
    faulty_proxy,
    gateway_timeout,
    never_carried_out,
)
from push import BATCH_TASKS, SETTLE_SECONDS
from support import RandomKills, eventually, finish, launch_script, text_result

TRANSCRIPT = "transcript_correction"
CORRECTED = text_result("corrected_transcript", "sửa rồi")


@pytest.fixture
def station(shared_station: Station) -> Station:
    shared_station.clear()
    return shared_station


@pytest.fixture
def proxy(station: Station) -> Iterator[FaultyProxy]:
    with faulty_proxy(station.address) as result:
        yield result


def push(station: Station, *arguments: str, expect: int = 0, **environment: str) -> dict[str, Any]:
    return station.run("push", "--task-type", TRANSCRIPT, *arguments, expect=expect, **environment)


def start_push(station: Station, *arguments: str, task_type: str = TRANSCRIPT, **env: str) -> subprocess.Popen[str]:
    return launch_script("push", "--json", "--task-type", task_type, *arguments, env_file=station.env_file, **env)


def kill(running: subprocess.Popen[str], station: Station) -> None:
    """As the kernel does it; returns when PostgreSQL has noticed."""
    running.kill()
    running.communicate()
    eventually(lambda: not at_work(station), "PostgreSQL notices that the push is gone")


def at_work(station: Station, more: str = "true") -> bool:
    """Whether a push has a connection for which something more holds."""
    query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'labelstation-push' AND {more}"
    return station.label_studio_db.execute(query).fetchone() != (0,)


def add_samples(station: Station, number: int) -> set[str]:
    rows = station.db.execute(
        """
        WITH added AS (
            INSERT INTO samples (external_id, source_type, audio_path, audio_file_md5)
            SELECT 's' || n, 'manual_upload', n || '.wav', md5(n::text) FROM generate_series(1, %s) AS n
            RETURNING sample_id
        )
        INSERT INTO revisions (sample_id, kind, version, sync_version, text, source)
        SELECT sample_id, kind::revision_kind, 1, 1, 'text', 'crawler'
        FROM added CROSS JOIN unnest(ARRAY['transcript', 'translation']) AS kind
        RETURNING sample_id::text
        """,
        [number],
    ).fetchall()
    return {sample_id for (sample_id,) in rows}


def assert_pushed_once(station: Station, samples: set[str]) -> None:
    """Each sample has one task in Label Studio, and the ledger has the same tasks as Label Studio."""
    tasks = station.tasks()
    assert set(tasks) == samples
    ledger = station.db.execute(
        "SELECT sample_id::text, label_studio_task_id, task_key, state::text, locked_by"
        " FROM tasks INNER JOIN samples USING (sample_id)"
    ).fetchall()
    assert {sample_id: task_id for sample_id, task_id, *_rest in ledger} == tasks
    assert len(ledger) == len(tasks)
    assert {(state, locked_by) for *_rest, state, locked_by in ledger} == {("open", "label_studio")}
    keys = station.label_studio_db.execute("SELECT id, meta ->> 'labelstation_key' FROM task").fetchall()
    assert {task_id: UUID(key) for task_id, key in keys} == {task_id: key for _sample, task_id, key, *_rest in ledger}
    assert push(station)["pushed"] == 0


def test_killed_at_any_instant(station: Station) -> None:
    samples = add_samples(station, 600)
    kills = RandomKills(station.db, seed=20, longest=1.0)
    reserved = 0
    while kills.number < 25:
        running = start_push(station, "--limit", "20")
        kills.strike(running)
        left = station.db.execute("SELECT count(*) FROM tasks WHERE state = 'reserved'").fetchone()
        if left != (0,):
            # Otherwise the next ones would all be killed while they look for these.
            reserved += 1
            push(station, "--limit", "1")
    assert reserved > 0, "no kill came amid a reservation"
    push(station)
    assert_pushed_once(station, samples)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("fate", [answer_lost, gateway_timeout, never_carried_out], ids=lambda fate: fate.__name__)
def test_an_import_without_an_answer_is_cleared_up_in_the_same_run(
    station: Station, proxy: FaultyProxy, fate: Any, batches: int
) -> None:
    number = (batches - 1) * BATCH_TASKS + 30
    samples = add_samples(station, number)
    proxy.fates = [fate]
    done = push(station, LABEL_STUDIO_URL=proxy.address)
    assert done["pushed"] == number
    assert proxy.imports() == (batches + 1 if fate is never_carried_out else batches)
    assert_pushed_once(station, samples)


def test_an_import_that_takes_longer_than_the_time_limit(station: Station, proxy: FaultyProxy) -> None:
    samples = add_samples(station, 30)
    slow = Held(carried_out_first=True)
    proxy.fates = [slow]
    done = push(station, LABEL_STUDIO_URL=proxy.address, LABEL_STUDIO_TIMEOUT_SECONDS="1")
    slow.released.set()
    assert (done["pushed"], proxy.imports()) == (30, 1)
    assert "did not answer" in done["stderr"]
    assert_pushed_once(station, samples)


def test_killed_before_the_answer_with_the_next_batch_reserved(station: Station, proxy: FaultyProxy) -> None:
    number = BATCH_TASKS + 30
    samples = add_samples(station, number)
    held = Held(carried_out_first=True)
    proxy.fates = [held]
    running = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    reserved = "SELECT count(*) FROM tasks WHERE state = 'reserved'"
    eventually(lambda: station.db.execute(reserved).fetchone() == (number,), "the next batch is reserved")
    kill(running, station)
    assert proxy.imports() == 1
    done = push(station)
    assert (done["recovered"], done["pushed"]) == (number, 0)
    held.released.set()
    assert_pushed_once(station, samples)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_end_while_label_studio_says_nothing(
    station: Station, proxy: FaultyProxy, sent: signal.Signals, code: int
) -> None:
    samples = add_samples(station, 30)
    held = Held(carried_out_first=True)
    proxy.fates = [held]
    running = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    running.send_signal(sent)
    # The answer is held for as long as this takes.
    assert finish(running, expect=code) == ("", "")
    assert not held.done.is_set()
    held.released.set()
    assert push(station)["recovered"] == 30
    assert_pushed_once(station, samples)


def test_killed_between_import_and_recording(station: Station, proxy: FaultyProxy) -> None:
    samples = add_samples(station, 30)
    held = Held(carried_out_first=True)
    proxy.fates = [held]
    running = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    with psycopg.connect(station.db.info.dsn) as somebody:
        somebody.execute("SELECT FROM tasks FOR UPDATE")
        held.released.set()
        eventually(lambda: at_work(station, "wait_event_type = 'Lock'"), "the push records what it made")
        kill(running, station)
    assert push(station)["recovered"] == 30
    assert_pushed_once(station, samples)


def test_an_import_that_label_studio_is_still_at_when_the_next_push_looks(station: Station) -> None:
    samples = add_samples(station, 30)
    with psycopg.connect(station.label_studio_db.info.dsn) as blocker:
        blocker.execute("LOCK TABLE task IN EXCLUSIVE MODE")
        running = start_push(station)
        blocked = (
            "SELECT count(*) FROM pg_locks INNER JOIN pg_class ON pg_class.oid = relation"
            " WHERE relname = 'task' AND NOT granted"
        )
        eventually(lambda: station.label_studio_db.execute(blocked).fetchone() == (1,), "Label Studio is at the import")
        kill(running, station)
        again = start_push(station)
        eventually(lambda: at_work(station, "query LIKE '%meta ->>%'"), "the next push looks for the tasks")
        # Longer than it would wait if nothing were at work in Label Studio.
        began = time.monotonic()
        eventually(lambda: time.monotonic() > began + SETTLE_SECONDS + 2, "the next push has looked for long")
    done = json.loads(finish(again)[0])
    assert (done["recovered"], done["twins_removed"]) == (30, 0)
    assert_pushed_once(station, samples)


def late_import(station: Station, proxy: FaultyProxy) -> None:
    """An import reaches Label Studio after the next push has looked for its tasks and made them again."""
    held = Held(carried_out_first=False)
    proxy.fates = [held]
    running = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    kill(running, station)
    done = push(station)
    assert done["recovered"] > 0
    held.released.set()
    assert held.done.wait(60)


def twins(station: Station) -> dict[str, list[int]]:
    rows = station.label_studio_db.execute(
        "SELECT data ->> 'sample_id', array_agg(id ORDER BY id) FROM task GROUP BY 1"
    )
    return dict(rows.fetchall())


def test_twins_that_appear_late_are_removed_but_never_one_that_somebody_worked_on(
    station: Station, proxy: FaultyProxy
) -> None:
    samples = add_samples(station, 5)
    late_import(station, proxy)
    made = twins(station)
    assert all(len(pair) == 2 for pair in made.values())
    untouched, first, second, drafted, both = sorted(made)
    ledger: dict[str, int] = dict(
        station.db.execute("SELECT sample_id::text, label_studio_task_id FROM tasks").fetchall()
    )
    late = {sample_id: next(task for task in pair if task != ledger[sample_id]) for sample_id, pair in made.items()}
    station.admin.annotate(ledger[first], CORRECTED)
    station.admin.annotate(late[second], CORRECTED)
    station.admin.call("POST", f"/api/tasks/{late[drafted]}/drafts", {"result": CORRECTED, "lead_time": 1})
    for task_id in made[both]:
        station.admin.annotate(task_id, CORRECTED)

    done = push(station, expect=4)
    assert done["twins_removed"] == 4
    assert f"tasks {made[both]} in Label Studio are one and the same" in done["stderr"]
    left = twins(station)
    assert left[both] == made[both]
    assert (left[first], left[second], left[drafted]) == ([ledger[first]], [late[second]], [late[drafted]])
    assert len(left[untouched]) == 1

    station.admin.delete_task(made[both][1])
    done = push(station)
    assert (done["twins_removed"], done["pushed"]) == (0, 0)
    assert station.run("pull", "--task-type", TRANSCRIPT)[TRANSCRIPT]["new"] == 3
    states = station.db.execute("SELECT sample_id::text, label_studio_task_id, state::text FROM tasks").fetchall()
    assert {sample_id: task_id for sample_id, task_id, _state in states} == station.tasks()
    assert {sample_id for sample_id, _task_id, state in states if state == "done"} == {first, second, both}
    assert set(station.tasks()) == samples


def test_a_push_killed_while_it_removes_twins_loses_no_task(station: Station, proxy: FaultyProxy) -> None:
    samples = add_samples(station, 3)
    late_import(station, proxy)
    chosen = sorted(samples)[0]
    ledger = station.db.execute("SELECT label_studio_task_id FROM tasks WHERE sample_id = %s", [chosen]).fetchone()
    assert ledger is not None
    late = next(task for task in twins(station)[chosen] if task != ledger[0])
    station.admin.call("POST", f"/api/tasks/{late}/drafts", {"result": CORRECTED, "lead_time": 1})
    with psycopg.connect(station.db.info.dsn) as somebody:
        somebody.execute("SELECT FROM tasks FOR UPDATE")
        running = start_push(station)
        eventually(lambda: at_work(station, "wait_event_type = 'Lock'"), "the push notes which twin it keeps")
        assert len(twins(station)[chosen]) == 2
        kill(running, station)
    assert push(station)["twins_removed"] == 3
    assert_pushed_once(station, samples)


def test_what_others_put_into_the_project_is_left_alone(station: Station) -> None:
    add_samples(station, 1)
    project = station.projects[TRANSCRIPT]
    for key in ("no-uuid", "11111111-1111-1111-1111-111111111111"):
        task = {"data": {"audio": "/a.wav", "text": "t", "sample_id": key}, "meta": {"labelstation_key": key}}
        station.admin.call("POST", f"/api/projects/{project}/import", [task, task])
    assert push(station)["twins_removed"] == 0
    assert station.label_studio_db.execute("SELECT count(*) FROM task").fetchone() == (5,)


def test_label_studio_stops_and_comes_back(
    station: Station, proxy: FaultyProxy, running_label_studio: RunningLabelStudio
) -> None:
    samples = add_samples(station, 30)

    def stop(exchange: Exchange) -> Answer | None:
        server = running_label_studio.server.process()
        assert server is not None
        for process in (server, *server.children(recursive=True)):
            process.kill()
        running_label_studio.server.stop()
        return never_carried_out(exchange)

    proxy.fates = [stop]
    try:
        push(station, expect=75, LABEL_STUDIO_URL=proxy.address)
        assert "cannot be reached" in push(station, expect=75)["stderr"]
    finally:
        running_label_studio.server.start()
    assert push(station)["recovered"] == 30
    assert_pushed_once(station, samples)


def test_postgresql_breaks_off(station: Station, proxy: FaultyProxy) -> None:
    samples = add_samples(station, 30)
    held = Held(carried_out_first=True)
    proxy.fates = [held]
    running = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    station.db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                       " WHERE application_name = 'labelstation-push' AND usename = current_user")  # fmt: skip
    held.released.set()
    _output, errors = finish(running, expect=75)
    assert errors.count("\n") == 1
    assert "PostgreSQL broke off" in errors
    assert push(station)["recovered"] == 30
    assert_pushed_once(station, samples)


def test_terminated_while_postgresql_works(station: Station) -> None:
    samples = add_samples(station, 30)
    with psycopg.connect(station.db.info.dsn) as somebody:
        somebody.execute("SELECT FROM samples FOR UPDATE")
        running = start_push(station)
        eventually(lambda: at_work(station, "wait_event_type = 'Lock'"), "the push reserves")
        running.send_signal(signal.SIGTERM)
        assert finish(running, expect=143) == ("", "")
    assert station.db.execute("SELECT exit_code FROM runs").fetchall() == [(143,)]
    assert push(station)["pushed"] == 30
    assert_pushed_once(station, samples)


def test_a_second_push_of_the_same_type_leaves_with_75(station: Station, proxy: FaultyProxy) -> None:
    samples = add_samples(station, 30)
    held = Held(carried_out_first=True)
    proxy.fates = [held]
    first = start_push(station, LABEL_STUDIO_URL=proxy.address)
    assert held.arrived.wait(60)
    assert "another push of transcript_correction is running" in push(station, expect=75)["stderr"]
    held.released.set()
    finish(first)
    assert_pushed_once(station, samples)


def test_pushes_of_different_types_at_once_give_each_sample_one_task(station: Station) -> None:
    samples = add_samples(station, 400)
    both = [start_push(station, task_type=task_type) for task_type in (TRANSCRIPT, "translation_review")]
    for running in both:
        finish(running)
    rows = station.label_studio_db.execute("SELECT data ->> 'sample_id', project_id FROM task").fetchall()
    assert len(rows) == len(samples)
    assert {sample_id for sample_id, _project in rows} == samples
    assert station.db.execute("SELECT count(*) FROM tasks WHERE state = 'open'").fetchone() == (400,)
