"""Searches for books and prints what it found: a parser as it was before there was a sidecar."""

import sys

import requests

URL = "https://web-agr.chitai-gorod.ru/web/api/v2/search/product"
# The token that it was written with has died long ago.
HEADERS = {"Authorization": "Bearer expired", "User-Agent": "Mozilla/5.0"}


def search(session: requests.Session, phrase: str) -> str:
    """One line about the best finds."""
    query = {"customerCityId": 39, "products[page]": 1, "products[per-page]": 5, "phrase": phrase}
    answer = session.get(URL, params=query, timeout=90)
    answer.raise_for_status()
    found = answer.json()
    titles = [item["attributes"]["title"] for item in found.get("included", []) if item.get("type") == "product"]
    return f"{phrase}: HTTP {answer.status_code}, {len(answer.content)} bytes, {', '.join(titles) or 'no titles'}"


def main(phrases: list[str]) -> None:
    with requests.Session() as session:
        session.headers.update(HEADERS)
        for phrase in phrases:
            print(search(session, phrase), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["python"])
