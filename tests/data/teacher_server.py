"""An OpenAI-compatible server that can simulate errors, and counts requests and answers."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """The state of a server. `script(question, number)` decides the answer to a question's `number`-th request (from 0):

    a text              this answer
    ("half", text)      the first half of the answer's JSON
    ("cut", text)       the connection closes in the middle of it
    ("choices", value)  these choices
    ("finish", text, why)
    ("status", code, headers, message)
    ("hold", event)     the answer "held", once the event is set
    """

    def __init__(self, script, tokens=10):
        self.script, self.tokens, self.lock = script, tokens, threading.Lock()
        self.asked, self.answered, self.bodies, self.headers = Counter(), Counter(), [], []
        self.waiting = self.most_waiting = 0

    def post(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            number = self.asked[question]
            self.asked[question] += 1
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            self.act(handler, question, self.script(question, number))
        except (BrokenPipeError, ConnectionResetError):
            pass  # The client has disconnected.
        finally:
            with self.lock:
                self.waiting -= 1

    def act(self, handler, question, action):
        kind, *details = action if isinstance(action, tuple) else ("text", action)
        if kind == "status":
            code, headers, message = details
            self.send(
                handler, json.dumps({"error": {"message": message, "code": headers.pop("code", None)}}), code, headers
            )
            return
        if kind == "hold":
            details[0].wait(60)
            details = ["held"]
        choices = [
            {
                "index": 0,
                "finish_reason": details[1] if kind == "finish" else "stop",
                "message": {"role": "assistant", "content": details[0]},
            }
        ]
        body = json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "teacher",
                "choices": details[0] if kind == "choices" else choices,
                "usage": {"prompt_tokens": 4, "completion_tokens": self.tokens - 4, "total_tokens": self.tokens},
            }
        )
        if kind == "half":
            self.send(handler, body[: len(body) // 2])
        elif kind == "cut":
            self.send(handler, body, cut=len(body) // 2)
        else:
            self.send(handler, body)
            with self.lock:
                self.answered[question] += 1

    def send(self, handler, body, code=200, headers=None, cut=None):
        handler.send_response(code)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:cut].encode())
        handler.wfile.flush()
        if cut is not None:
            handler.close_connection = True


@contextmanager
def serving(script, **settings):
    """The server's state, and the address of its API in `endpoint`."""
    state = Server(script, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            state.post(self)

        def log_message(self, *args):
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass

    listener = Listener(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{listener.server_port}/v1"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        listener.shutdown()
        listener.server_close()
