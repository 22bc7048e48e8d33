"""The shop of the compose test: its page and its API over TLS, and a port by which the test moves it.

The page of www sets the token's cookie, as the real one does. The API answers 401 to any token that is not in force.

Control (HTTP, port 8000): POST /revoke?after=N refuses the present token once N more API requests were answered with it;
GET /stats tells what came, as JSON.
"""

import base64
import json
import ssl
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LIFE = 168_000
SHOP = "www.chitai-gorod.ru"


def encoded(part: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def anonymous_token() -> str:
    now = int(time.time())
    claims = {"exp": now + LIFE, "iat": now, "iss": "/api/v1/auth/anonymous", "sub": uuid.uuid4().hex * 2, "type": 10}
    return f"{encoded({'alg': 'HS256', 'typ': 'JWT'})}.{encoded(claims)}.c2lnbmF0dXJl"


class State:
    """Which tokens are in force, and what came."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.good: set[str] = set()
        self.left: int | None = None
        self.stats = {"pages": 0, "sign_ins": 0, "api": 0, "refused": 0, "slow": 0}

    def issue(self, kind: str) -> str:
        with self.lock:
            self.stats[kind] += 1
            token = anonymous_token()
            self.good.add(token)
            return token

    def judge(self, token: str) -> bool:
        with self.lock:
            if self.left == 0:
                self.good.clear()
                self.left = None
            good = token in self.good
            self.stats["api" if good else "refused"] += 1
            if good and self.left:
                self.left -= 1
            return good

    def revoke(self, after: int) -> None:
        with self.lock:
            self.left = after

    def count_slow(self, change: int) -> None:
        with self.lock:
            self.stats["slow"] += change


STATE = State()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def reply(self, status: int, body: object, **headers: str) -> None:
        content = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("content_type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


class Shop(Handler):
    def do_GET(self) -> None:
        if self.headers["Host"] == SHOP:
            cookie = f"access-token=Bearer%20{STATE.issue('pages')}; Path=/; Domain=.chitai-gorod.ru"
            self.reply(200, "shop", content_type="text/html", Set_Cookie=cookie)
        else:
            self.api()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/v1/auth/anonymous"):
            token = STATE.issue("sign_ins")
            self.reply(201, {"token": {"accessToken": f"Bearer {token}", "expAccessToken": int(time.time()) + LIFE}})
        else:
            self.api()

    def api(self) -> None:
        target = urlsplit(self.path)
        if not STATE.judge(self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self.reply(401, {"message": "Authorization обязательное поле", "requestId": uuid.uuid4().hex})
            return
        if target.path.endswith("/slow"):
            STATE.count_slow(1)
            time.sleep(float(parse_qs(target.query)["seconds"][0]))
            STATE.count_slow(-1)
        phrase = parse_qs(target.query).get("phrase", [""])[0]
        book = {"type": "product", "id": "1", "attributes": {"title": f"Книга про {unquote(phrase)}"}}
        self.reply(200, {"data": {"type": "searchResult"}, "included": [book]})


class Control(Handler):
    def do_GET(self) -> None:
        self.reply(200, STATE.stats)

    def do_POST(self) -> None:
        STATE.revoke(int(parse_qs(urlsplit(self.path).query)["after"][0]))
        self.reply(200, {})


def main(certificate: str, key: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    shop = ThreadingHTTPServer(("0.0.0.0", 443), Shop)
    # The handshake belongs to the connection's thread, not to the one that accepts.
    shop.socket = context.wrap_socket(shop.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=shop.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("0.0.0.0", 8000), Control).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
