"""The system that the sidecar replaces, as far as others can tell: its keys, its calls, its one recovery.

old_system.py refresh           solve, and put the token into both keys, as the scheduled task does
old_system.py search PHRASE     search as its API client does: token from the cookies key, one refresh of its own on 401
"""

import json
import os
import sys
from urllib.parse import unquote

import redis
import requests

TTL = 86_400
BASE = os.getenv("CHITAI_GOROD_API_URL", "https://web-agr.chitai-gorod.ru/web/api/v2")
STORE = redis.Redis(host="redis", decode_responses=True)


def refresh() -> None:
    page = {"cmd": "request.get", "url": "https://www.chitai-gorod.ru", "maxTimeout": 60_000, "disableMedia": True}
    solution = requests.post("http://flaresolverr:8191/v1", json=page, timeout=90).json()["solution"]
    cookies = {cookie["name"]: cookie["value"] for cookie in solution["cookies"]}
    token = unquote(cookies["access-token"]).removeprefix("Bearer ")
    STORE.setex("chitai_gorod_token", TTL, token)
    STORE.setex("chitai_gorod_cookies", TTL, json.dumps(cookies))


def headers() -> dict[str, str]:
    cookies = json.loads(STORE.get("chitai_gorod_cookies") or "{}")
    return {"authorization": unquote(cookies.get("access-token", "")), "platform": "desktop", "shop-brand": "chitaiGorod"}


def ask(phrase: str) -> int:
    return requests.get(f"{BASE}/search/product", params={"phrase": phrase}, headers=headers(), timeout=15).status_code


def search(phrase: str) -> str:
    status = ask(phrase)
    if status != 401:
        return f"{status} at once"
    refresh()
    return f"{ask(phrase)} after a refresh of its own"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["refresh"]:
            refresh()
        case ["search", phrase]:
            print(search(phrase))
