"""A parser on `requests` that opens a new connection for each call."""

import sys

import requests

api, gate, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(count):
    if number % 3 == 2:
        answer = requests.get(f"{gate}/plain/{number}", timeout=20)
    elif number % 3 == 1:
        answer = requests.post(f"{api}/plain/{number}", json={"id": number}, timeout=20)
    else:
        answer = requests.get(
            f"{api}/plain/{number}",
            params={"products[page]": 1, "phrase": "книга"},
            headers={"Authorization": "Bearer stale"},
            timeout=20,
        )
    print("status", answer.status_code, flush=True)
