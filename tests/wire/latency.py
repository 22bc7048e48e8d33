"""A normal client for tests/slowhttp.sh: 50 requests a second, every other on a connection of its own.

    latency.py PROXY SECONDS

Prints how many there were, how many were not answered by 200, and their times.
"""

import socket
import sys
import time

HOST = "web-agr.chitai-gorod.ru"
ADDRESS, SECONDS = sys.argv[1].rsplit(":", 1), float(sys.argv[2])


def connect():
    connection = socket.create_connection((ADDRESS[0], int(ADDRESS[1])), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(connection):
    connection.sendall(f"GET http://{HOST}/web/api/v2/x HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b'{"data": []}'):
        part = connection.recv(65536)
        if not part:
            return False
        answer += part
    return answer.startswith(b"HTTP/1.1 200 ")


def quantile(times, share):
    return 1000 * sorted(times)[min(len(times) - 1, int(len(times) * share))]


kept, times, failed, end = None, [], 0, time.monotonic() + SECONDS
while (begun := time.monotonic()) < end:
    try:
        if len(times) % 2:
            kept = kept or connect()
            good = ask(kept)
        else:
            with connect() as fresh:
                good = ask(fresh)
    except OSError:
        good, kept = False, None
    times.append(time.monotonic() - begun)
    failed += not good
    time.sleep(max(0, 0.02 - times[-1]))
print(
    f"{len(times)} requests, {failed} failed, p50 {quantile(times, 0.5):.1f} ms, "
    f"p99 {quantile(times, 0.99):.1f} ms, slowest {1000 * max(times):.1f} ms"
)
