"""A parser on `httpx` that offers HTTP/2."""

import sys

import httpx

api, count = sys.argv[1], int(sys.argv[3])
with httpx.Client(http2=True, timeout=20) as client:
    for number in range(count):
        answer = client.get(f"{api}/http2/{number}", params={"products[page]": 1})
        print("status", answer.status_code, flush=True)
