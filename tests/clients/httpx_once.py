"""One call of a parser on `httpx`, with its default time-outs of 5 s or those it is told."""

import sys

import httpx

api, timeout = sys.argv[1], float(sys.argv[2])
try:
    print("status", httpx.get(f"{api}/once", timeout=timeout).status_code)
except httpx.ReadTimeout:
    print("timed out")
