"""A parser on `curl_cffi` that looks like a browser: calls without a session, then a session."""

import sys

from curl_cffi import requests

api, count = sys.argv[1], int(sys.argv[3])
half = count // 2
for number in range(half):
    answer = requests.get(f"{api}/curl_cffi/{number}", impersonate="chrome", timeout=20)
    print("status", answer.status_code, flush=True)
with requests.Session(impersonate="chrome") as session:
    for number in range(half, count):
        answer = session.post(f"{api}/curl_cffi/{number}", json={"id": number}, timeout=20)
        print("status", answer.status_code, flush=True)
