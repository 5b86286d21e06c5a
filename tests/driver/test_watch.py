"""Deaths of actors and engines, and events that only look like a death, with real Ray actors and HTTP servers."""

import os
import queue
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from hapo_verl.driver.progress import Position
from hapo_verl.driver.watch import BUSY_SECONDS, Stall, Watch
from hapo_verl.protocol.stacks import answer_the_signal

ADVICE = "Start it again."


class Member:
    """An actor of a run."""

    def __init__(self):
        answer_the_signal()

    def process(self):
        return os.getpid()

    def fail_to_update(self, error):
        self.hapo_weight_update_error = error

    def work(self, seconds):
        time.sleep(seconds)


@pytest.fixture(scope="module")
def actors():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    make = ray.remote(num_cpus=0)(Member).remote
    yield lambda: make()
    ray.shutdown()


@pytest.fixture
def server():
    """An engine's HTTP server, with answers that can be set."""
    answer = {"status": 200, "delay": 0.0}

    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/health"
            time.sleep(answer["delay"])
            self.send_response(answer["status"])
            self.end_headers()

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{http.server_port}", answer
    http.shutdown()
    http.server_close()


def eventually(look, seconds=30):
    """Call until the answer is not empty, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing was found"
        time.sleep(0.1)
    return found


def test_a_busy_actor_is_alive_and_a_killed_one_is_named_with_its_cause(actors):
    busy, idle = actors(), actors()
    process = ray.get(busy.process.remote())
    ray.get(idle.process.remote())
    working = busy.work.remote(60)
    watch = Watch(interval=0.1, advice=ADVICE)
    watch.over({"busy": busy, "idle": idle})
    for _ in range(5):
        assert watch.dead() == {}
        time.sleep(0.2)
    os.kill(process, signal.SIGKILL)
    found = eventually(watch.dead)
    assert list(found) == ["busy"]
    assert found["busy"].startswith("The actor is dead because its worker process has died.")
    assert "\n" not in found["busy"]
    assert "OOM" not in found["busy"]
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(working)


def test_an_engine_is_dead_if_its_server_reports_it(server):
    address, answer = server
    watch = Watch(interval=0.2, advice=ADVICE)
    watch._engines = {"engine": address}
    assert watch.dead() == {}
    answer["status"] = 404  # This is the server of another engine.
    assert watch.dead() == {}
    answer["status"] = 503
    assert watch.dead() == {"engine": f"{address}/health answers 503"}


def test_a_slow_server_is_not_dead(server):
    address, answer = server
    answer["delay"] = 1.0
    watch = Watch(interval=0.2, advice=ADVICE)
    watch._engines = {"engine": address}
    assert [watch.dead() for _ in range(3)] == [{}, {}, {}]


def test_a_server_is_dead_if_it_refuses_for_longer_than_ray_needs_to_name_the_cause(unused_port, monkeypatch):
    monkeypatch.setattr("hapo_verl.driver.watch.REFUSED_SECONDS", 0.5)
    address = f"127.0.0.1:{unused_port}"
    watch = Watch(interval=0.2, advice=ADVICE)
    watch._engines = {"engine": address}
    assert watch.dead() == {}
    assert watch.dead() == {}
    time.sleep(0.6)
    assert watch.dead() == {"engine": f"{address} refuses connections"}


def test_the_run_ends_once_with_a_line_that_names_every_dead_process(actors, capsys):
    first, second, third = actors(), actors(), actors()
    ray.get([actor.process.remote() for actor in (first, second, third)])
    ends: queue.Queue[None] = queue.Queue()
    watch = Watch(interval=0.1, advice=ADVICE, end=lambda: ends.put(None))
    watch.over({"agent loop worker 0": first})
    watch.over({"agent loop worker 1": second, "reward worker 0": third})
    watch.start()
    with pytest.raises(queue.Empty):
        ends.get(timeout=1)
    ray.kill(first)
    ray.kill(third)
    ends.get(timeout=30)
    assert capsys.readouterr().err == (
        "hapo: agent loop worker 0, reward worker 0 died (The actor is dead because it was killed by `ray.kill`). "
        "Start it again.\n"
    )
    with pytest.raises(queue.Empty):
        ends.get(timeout=3)
    watch.stop()


@pytest.fixture
def stopping(actors):
    """A started watch that has not checked anything yet, its actor, and the calls of its `end`."""
    actor = actors()
    ray.get(actor.process.remote())
    ends: list[str] = []
    watch = Watch(interval=60, advice=ADVICE, end=lambda: ends.append("ended"))
    watch.over({"worker": actor})
    watch.start()
    return watch, actor, ends


def test_a_stopped_watch_does_not_report_a_normal_end_as_a_death(stopping, capsys):
    watch, actor, ends = stopping
    ray.kill(actor)
    watch.stop()
    time.sleep(3)
    assert (ends, capsys.readouterr().err) == ([], "")


def test_a_death_that_the_trainer_sees_before_ray_reports_it_is_named(stopping, capsys):
    watch, actor, ends = stopping
    threading.Timer(3, ray.kill, [actor]).start()
    watch.stop(failed=True)
    assert ends == []
    assert capsys.readouterr().err.startswith("hapo: worker died (")


def test_a_trainer_that_fails_by_itself_is_not_delayed_for_long(stopping, capsys, monkeypatch):
    monkeypatch.setattr("hapo_verl.driver.watch.FAILED_SECONDS", 3.0)
    watch, _, ends = stopping
    started = time.monotonic()
    watch.stop(failed=True)
    assert 3 <= time.monotonic() - started < 20
    assert (ends, capsys.readouterr().err) == ([], "")


def test_an_engine_that_could_not_load_new_weights_ends_the_run_with_its_own_error(actors, capsys):
    server, other = actors(), actors()
    ray.get([actor.process.remote() for actor in (server, other)])
    ends: queue.Queue[None] = queue.Queue()
    watch = Watch(interval=0.1, advice=ADVICE, end=lambda: ends.put(None))
    watch.over(
        {"vllm server 0": server, "vllm server 1": other}, updated={"vllm server 0": server, "vllm server 1": other}
    )
    watch.start()
    with pytest.raises(queue.Empty):
        ends.get(timeout=1)
    ray.get(server.fail_to_update.remote("Exception: Call to collective_rpc method failed: ValueError: tied"))
    ends.get(timeout=30)
    assert capsys.readouterr().err == (
        "hapo: vllm server 0 could not load new weights (Exception: Call to collective_rpc method failed: ValueError: "
        "tied). Start it again.\n"
    )
    watch.stop()


@pytest.fixture
def standing(actors, tmp_path):
    """A watch over a busy and an idle actor, and a trainer whose position is `place`."""
    busy, idle = actors(), actors()
    ray.get([actor.process.remote() for actor in (busy, idle)])
    place, ends, watches = [("here", 1)], queue.Queue(), []

    def watch(report, limit):
        stall = Stall(lambda: Position(place[0], f"step {place[0][1]}: fit > update"), report, limit, tmp_path / "run")
        watch = Watch(interval=0.2, advice=ADVICE, stall=stall, end=lambda: ends.put(None))
        watch.over({"training worker 0": busy, "reward worker 0": idle})
        eventually(lambda: ray.wait([*watch._places.values()], num_returns=2, timeout=0)[0])
        work = busy.work.remote(120)
        watches.append(watch)
        return watch, work

    yield watch, place, ends
    for started in watches:
        started.stop()
    ray.kill(busy)


def test_a_trainer_that_hangs_is_reported_once_with_the_stacks_of_all_processes(standing, tmp_path, capsys):
    watch, place, ends = standing
    watch, _work = watch(BUSY_SECONDS + 2, None)
    watch.start()
    (file,) = eventually(lambda: list((tmp_path / "run").glob("hapo_stacks_*.txt")), 90)
    said = eventually(lambda: capsys.readouterr().err, 90)
    time.sleep(2)
    assert capsys.readouterr().err == ""
    assert ends.empty()
    # An idle actor counts as busy if a loaded machine makes it answer too late.
    assert re.fullmatch(
        r"hapo: no progress for \d+ s in step 1: fit > update; busy: training worker 0(, reward worker 0)?; Ray has \d of 1 CPUs free. "
        rf"Stacks of all processes: {file}. The run goes on.\n",
        said,
    )
    text = file.read_text()
    assert text.startswith("step 1: fit > update\n\ntrainer: ")
    # This process is reported as not answering, since it is not a process of Ray; the blocked actor shows where it is.
    assert re.search(r"training worker 0, process \d+: .*\n(.*\n)*.* in work\n", text)
    assert re.search(r"reward worker 0, process \d+: ", text)
    # If there is progress and then another hang, that is reported in another line.
    place[0] = ("there", 2)
    assert eventually(lambda: capsys.readouterr().err, 90).startswith("hapo: no progress for ")


def test_the_run_ends_when_it_hangs_for_too_long(standing, capsys):
    watch, _, ends = standing
    watch, _work = watch(None, 1.5)
    started = time.monotonic()
    watch.start()
    ends.get(timeout=90)
    assert time.monotonic() - started >= 1.5
    said = capsys.readouterr().err
    assert said.endswith("The run ends. Start it again.\n")
    assert said.count("\n") == 1


def test_a_trainer_that_makes_progress_is_never_reported_as_hanging(standing, capsys):
    watch, place, ends = standing
    watch, _work = watch(4.0, 5.0)
    watch.start()
    for number in range(14):
        place[0] = ("here", number)
        time.sleep(0.5)
    watch.stop()
    assert (ends.empty(), capsys.readouterr().err) == (True, "")
