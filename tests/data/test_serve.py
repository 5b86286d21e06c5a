"""The server that `teach` starts gets model and port, is waited for, and always ends when `teach` ends."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from hapo_verl.data.parquet import DataError
from hapo_verl.data.serve import served

SERVER = """
import http.server, os, subprocess, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if arguments["--model"] == "broken":
    sys.exit(3)
if arguments["--model"] == "slow":
    import time
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = " ".join(sys.argv[1:]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    return [sys.executable, str(tmp_path / "server.py")]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def child_of(log):
    return int(log.read_text().split()[1])


def gone(pid, seconds=30):
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


def test_a_server_is_ready_in_the_context_and_ends_with_its_children_after_it(tmp_path, command):
    log = tmp_path / "logs" / "server.log"
    with served("model", ["--dtype", "float32"], log, limit=60, command=command) as endpoint:
        assert endpoint.startswith("http://127.0.0.1:")
        assert endpoint.endswith("/v1")
        with urllib.request.urlopen(endpoint) as answer:
            said = answer.read().decode()
        assert said.startswith("--model model --host 127.0.0.1 --port ")
        assert said.endswith(" --dtype float32")
        child = child_of(log)
        assert is_alive(child)
    assert gone(child)


def test_a_server_that_ends_or_is_too_slow_is_one_line_with_its_output(tmp_path, command):
    log = tmp_path / "server.log"
    with pytest.raises(DataError) as error, served("broken", [], log, limit=60, command=command):
        pass
    assert str(error.value) == f"--serve: vLLM ended with exit code 3 before it was ready. Its output is {log}."
    begun = time.monotonic()
    with pytest.raises(DataError) as error, served("slow", [], log, limit=0.5, command=command):
        pass
    assert (
        str(error.value) == f"--serve-limit 0.5: vLLM was not ready in this time. Its output is {log}; give it longer."
    )
    assert time.monotonic() - begun < 30


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
def test_a_server_ends_when_its_parent_is_killed(tmp_path, command):
    log = tmp_path / "server.log"
    code = (
        "import sys, time; from pathlib import Path; from hapo_verl.data.serve import served\n"
        f"with served('model', [], Path({str(log)!r}), limit=60, command={command!r}) as endpoint:\n"
        "    print(endpoint, flush=True)\n    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    endpoint = parent.stdout.readline().strip()
    server = int(
        subprocess.run(
            ["ps", "-o", "ppid=", "-p", str(child_of(log))], capture_output=True, text=True, check=True
        ).stdout
    )
    assert is_alive(server)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(server), endpoint
    os.kill(child_of(log), signal.SIGKILL)
