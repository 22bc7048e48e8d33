"""An API client that ignores proxies and is led by its base URL alone (`CHITAI_GOROD_API_URL`)."""

import asyncio
import sys

import aiohttp

base, count = sys.argv[1], int(sys.argv[2])


async def main():
    for number in range(count):
        timeout = aiohttp.ClientTimeout(total=15)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.get(f"{base}/gateway/{number}") as answer:
                await answer.read()
                print("status", answer.status, flush=True)


asyncio.run(main())
