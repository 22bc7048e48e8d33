"""A parser on `httpx`: calls without a client, a client, an asynchronous client."""

import asyncio
import sys

import httpx

api, count = sys.argv[1], int(sys.argv[3])
url = f"{api}/httpx"


async def asynchronous(numbers):
    async with httpx.AsyncClient() as client:
        for number in numbers:
            answer = await client.get(f"{url}/{number}", params={"phrase": "a b"})
            print("status", answer.status_code, flush=True)


third = count // 3
for number in range(third):
    print("status", httpx.get(f"{url}/{number}").status_code, flush=True)
with httpx.Client() as client:
    for number in range(third, 2 * third):
        print("status", client.post(f"{url}/{number}", json={"id": number}).status_code, flush=True)
asyncio.run(asynchronous(range(2 * third, count)))
