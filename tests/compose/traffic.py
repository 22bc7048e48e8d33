"""Parsers without pause: eight threads search through the proxy, slow answers among them, until SIGTERM.

A connection that is refused, or a proxy whose name is unknown for a moment, is tried again as clients do; anything else
that is not a 200 is lost. Prints a line once all threads have had an answer, and at the end the counts as JSON.
"""

import collections
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

API = "https://web-agr.chitai-gorod.ru/web/api/v2"
THREADS = 8

stop = threading.Event()
counts: collections.Counter[str] = collections.Counter()
lock = threading.Lock()
ready = threading.Barrier(THREADS + 1)


def outcome(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=90) as answer:
            answer.read()
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.headers.get('Proxy-Status')}"
    except urllib.error.URLError as error:
        if isinstance(error.reason, (ConnectionRefusedError, socket.gaierror)):
            return "retried"
        return repr(error.reason)
    except OSError as error:
        return repr(error)


def parse(number: int) -> None:
    slow = f"{API}/slow?seconds={3 + number / 2}" if number % 2 else f"{API}/search/product?phrase=python"
    first = True
    while not stop.is_set():
        got = outcome(slow)
        with lock:
            counts[got] += 1
        if got == "retried":
            time.sleep(0.1)
        elif first:
            first = False
            ready.wait()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threads = [threading.Thread(target=parse, args=[number]) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    ready.wait()
    print("running", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(counts), flush=True)


main()
