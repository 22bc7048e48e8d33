"""A spider on `scrapy` that walks through all categories at once, page after page, for some time."""

import json
import sys

import scrapy
from scrapy.crawler import CrawlerProcess

api, seconds = sys.argv[1], int(sys.argv[2])


class Catalogue(scrapy.Spider):
    name = "catalogue"
    handle_httpstatus_list = list(range(400, 600))
    custom_settings = {
        "CLOSESPIDER_TIMEOUT": seconds,
        "DOWNLOAD_DELAY": 0.04,
        "LOG_LEVEL": "ERROR",
        "TELNETCONSOLE_ENABLED": False,
    }
    errors = []
    longest = 0.0

    async def start(self):
        for category in range(16):
            yield self.page(category, 0)

    def page(self, category, page):
        url = f"{api}/products?category={category}&products[page]={page}"
        return scrapy.Request(url, self.parse, errback=self.failed, cb_kwargs={"category": category, "page": page})

    def parse(self, response, category, page):
        if response.status != 200:
            mark = response.headers.get("Proxy-Status", b"").decode()
            self.errors.append(f"{response.status} {mark} {response.text[:200]}")
        self.longest = max(self.longest, response.meta["download_latency"])
        yield self.page(category, page + 1)

    def failed(self, failure):
        self.errors.append(repr(failure.value))
        yield failure.request.replace(dont_filter=True)


process = CrawlerProcess()
crawler = process.create_crawler(Catalogue)
process.crawl(crawler)
process.start()
stats = crawler.stats.get_stats()
report = {
    "requests": stats.get("downloader/request_count", 0),
    "retries": stats.get("retry/count", 0),
    "longest": crawler.spider.longest,
    "errors": crawler.spider.errors,
}
print(json.dumps(report))
