"""A spider on `scrapy` that goes from page to page."""

import sys

import scrapy
from scrapy.crawler import CrawlerProcess

api, count = sys.argv[1], int(sys.argv[3])


class Books(scrapy.Spider):
    name = "books"
    handle_httpstatus_list = [401, 403, 429, 503]
    start_urls = [f"{api}/scrapy?page=0"]

    def parse(self, response):
        print("status", response.status, flush=True)
        page = int(response.url.rpartition("=")[2]) + 1
        if page < count:
            yield response.follow(f"?page={page}", self.parse)


process = CrawlerProcess({"LOG_LEVEL": "ERROR", "TELNETCONSOLE_ENABLED": False})
process.crawl(Books)
process.start()
