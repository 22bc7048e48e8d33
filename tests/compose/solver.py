"""A stand-in for FlareSolverr: opens the shop's page without a browser, and answers in FlareSolverr's form."""

import http.client
import json
import socket
import ssl
import time
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

VERSION = "3.5.0"


def cookies_of(url: str) -> list[dict]:
    """What the page sets. As in FlareSolverr any certificate will do; the page is played by the host `shop`."""
    context = ssl._create_unverified_context()
    page = urlsplit(url)
    connection = http.client.HTTPSConnection(page.hostname, timeout=10, context=context)
    connection.sock = context.wrap_socket(socket.create_connection(("shop", 443), 10), server_hostname=page.hostname)
    connection.request("GET", page.path or "/", headers={"User-Agent": "Solver/1"})
    answer = connection.getresponse()
    answer.read()
    cookies = SimpleCookie()
    for header in answer.headers.get_all("Set-Cookie", []):
        cookies.load(header)
    shape = {"httpOnly": False, "path": "/", "sameSite": "Lax", "secure": False}
    return [{"name": name, "value": morsel.value, "domain": morsel["domain"], **shape} for name, morsel in cookies.items()]


class FlareSolverr(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def reply(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply(200, {"status": "ok"})

    def do_POST(self) -> None:
        command = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        began = int(time.time() * 1000)
        # A browser takes longer still; solves that were to overlap shall be seen to.
        time.sleep(1)
        try:
            solution = {"url": command["url"], "status": 200, "cookies": cookies_of(command["url"])}
        except (OSError, http.client.HTTPException) as error:
            self.reply(500, {"status": "error", "message": f"Error: {error}"})
            return
        solution |= {"userAgent": "Mozilla/5.0 (X11; Linux x86_64) Solver/1", "headers": {}, "response": ""}
        times = {"startTimestamp": began, "endTimestamp": int(time.time() * 1000)}
        message = "Challenge not detected!"
        self.reply(200, {"status": "ok", "message": message, "solution": solution, "version": VERSION, **times})


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", 8191), FlareSolverr).serve_forever()
