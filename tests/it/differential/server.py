"""The second server of the differential test: Python's own http.server, which tells what it saw.

    server.py LOG

Prints its port, answers everything, and appends one JSON line to LOG for each request, refused ones too.
"""

import http.client
import http.server
import json
import sys
import threading

http.client._MAXHEADERS = 1000
LOCK = threading.Lock()
LOG = open(sys.argv[1], "a", encoding="ascii", buffering=1)
COUNT = 0


def note(**what):
    global COUNT
    with LOCK:
        COUNT += 1
        LOG.write(json.dumps(what) + "\n")
        return COUNT


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def chunked_body(self):
        body = b""
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            if size == 0:
                break
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def body(self):
        # As most servers do, and as attackers hope: the coding wins over the length.
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self.chunked_body()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self):
        try:
            body, whole = self.body(), True
            whole = len(body) == int(self.headers.get("Content-Length", len(body)))
        except ValueError:
            body, whole = b"", False
        number = note(
            request=self.requestline,
            fields=[[name, value] for name, value in self.headers.items()],
            length=len(body),
            sum=sum(body),
            whole=whole,
        )
        if not whole:
            self.close_connection = True
        said = self.requestline.rsplit(" ", 1)[0].encode("latin-1")
        self.send_response(200)
        self.send_header("X-Id", f"python-{number}")
        self.send_header("X-Seen", said.decode("latin-1"))
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    def send_error(self, code, message=None, explain=None):
        note(request=self.requestline, refused=code)
        self.close_connection = True
        super().send_error(code, message, explain)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request, client_address):
        # A proxy that breaks off is no error of this server.
        pass


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
