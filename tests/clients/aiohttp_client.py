"""A parser on `aiohttp` with `trust_env`: a new session for each call, then one for several at once."""

import asyncio
import sys

import aiohttp

api, count = sys.argv[1], int(sys.argv[3])
url = f"{api}/aiohttp"


async def ask(session, number):
    headers = {"Authorization": "Bearer stale"}
    async with session.get(f"{url}/{number}", params={"phrase": "книга"}, headers=headers) as answer:
        await answer.read()
        print("status", answer.status, flush=True)


async def main():
    half = count // 2
    for number in range(half):
        async with aiohttp.ClientSession(trust_env=True) as session:
            await ask(session, number)
    async with aiohttp.ClientSession(trust_env=True) as session:
        for number in range(half, count):
            await ask(session, number)


asyncio.run(main())
