"""A parser on the standard library alone."""

import json
import sys
import urllib.request

api, count = sys.argv[1], int(sys.argv[3])
for number in range(count):
    request = urllib.request.Request(f"{api}/urllib/{number}")
    if number % 2:
        request.data = json.dumps({"id": number}).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=20) as answer:
        answer.read()
        print("status", answer.status, flush=True)
