"""A program on `aiohttp` with `trust_env` that looks books up with a few workers, for some time."""

import asyncio
import json
import sys
import time

import aiohttp

api, seconds = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + seconds
report = {"requests": 0, "retries": 0, "longest": 0.0, "errors": []}


async def look_up(session, phrase):
    started = time.monotonic()
    report["requests"] += 1
    try:
        async with session.get(f"{api}/search", params={"phrase": phrase}) as answer:
            text = await answer.text()
            if answer.status != 200:
                mark = answer.headers.get("Proxy-Status", "")
                report["errors"].append(f"{answer.status} {mark} {text[:200]}")
    except (asyncio.TimeoutError, aiohttp.ClientError) as error:
        report["errors"].append(repr(error))
    report["longest"] = max(report["longest"], time.monotonic() - started)


async def worker(number):
    timeout = aiohttp.ClientTimeout(total=15)
    async with aiohttp.ClientSession(trust_env=True, timeout=timeout) as session:
        book = 0
        while time.monotonic() < end:
            await look_up(session, f"книга {number}-{book}")
            await asyncio.sleep(0.2)
            book += 1


async def main():
    await asyncio.gather(*(worker(number) for number in range(4)))


asyncio.run(main())
print(json.dumps(report))
