"""The API client of the system that the sidecar replaces, request for request.

It ignores proxies and is led by `CHITAI_GOROD_API_URL`. A session for each
request, a total time-out, a fixed number of tries; on 429 it sleeps
`Retry-After` and tries again, on 503 it gives up.
"""

import asyncio
import os
import sys

import aiohttp

BASE = os.getenv("CHITAI_GOROD_API_URL", "https://web-agr.chitai-gorod.ru/web/api/v2")
tries, total = int(sys.argv[1]), float(sys.argv[2])


async def search(phrase):
    for attempt in range(tries):
        try:
            timeout = aiohttp.ClientTimeout(total=total)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                async with session.get(f"{BASE}/search/product", params={"phrase": phrase}) as answer:
                    print("try", attempt + 1, answer.status, answer.headers.get("Retry-After", ""), flush=True)
                    if answer.status == 200:
                        return await answer.text()
                    if answer.status == 429:
                        await asyncio.sleep(int(answer.headers.get("Retry-After", 1)))
                        continue
                    return None
        except (asyncio.TimeoutError, aiohttp.ClientError) as error:
            print("try", attempt + 1, repr(error), flush=True)
    return None


print("result", "found" if asyncio.run(search("книга")) else "error")
