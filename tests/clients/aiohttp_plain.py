"""A parser on `aiohttp` without `trust_env`: it ignores proxies and knows its base URL alone."""

import asyncio
import sys

import aiohttp

api, count = sys.argv[1], int(sys.argv[3])


async def main():
    for number in range(count):
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.get(f"{api}/aiohttp/{number}") as answer:
                await answer.read()
                print("status", answer.status, flush=True)


asyncio.run(main())
