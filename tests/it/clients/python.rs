//! Python's clients.

use super::matrix::{AIOHTTP, CURL_CFFI, Client, HTTPX, REQUESTS, SCRAPY, URLLIB};
use super::{Way, check};
use crate::support::parser::script;

async fn check_script(client: &Client, way: Way, name: &str, packages: &str) {
    if let Some(command) = script(client.name, name, packages) {
        check(client, way, command).await;
    }
}

#[tokio::test]
async fn requests_without_a_session_sees_no_401_through_the_proxy() {
    check_script(&REQUESTS, Way::Proxy, "requests_plain.py", "requests").await;
}

#[tokio::test]
async fn requests_with_a_session_sees_no_401_through_the_proxy() {
    check_script(&REQUESTS, Way::Proxy, "requests_session.py", "requests").await;
}

#[tokio::test]
async fn requests_with_a_session_sees_no_401_at_the_gateway() {
    check_script(&REQUESTS, Way::Gateway, "requests_session.py", "requests").await;
}

#[tokio::test]
async fn requests_without_a_session_sees_no_401_behind_the_alias() {
    check_script(&REQUESTS, Way::Alias, "requests_plain.py", "requests").await;
}

#[tokio::test]
async fn urllib_sees_no_401_through_the_proxy() {
    check_script(&URLLIB, Way::Proxy, "urllib_client.py", "urllib").await;
}

#[tokio::test]
async fn urllib_sees_no_401_at_the_gateway() {
    check_script(&URLLIB, Way::Gateway, "urllib_client.py", "urllib").await;
}

#[tokio::test]
async fn httpx_sees_no_401_through_the_proxy() {
    check_script(&HTTPX, Way::Proxy, "httpx_client.py", "httpx").await;
}

#[tokio::test]
async fn httpx_that_offers_http_2_sees_no_401_through_the_proxy() {
    check_script(&HTTPX, Way::Proxy, "httpx_http2.py", "httpx, h2").await;
}

#[tokio::test]
async fn httpx_sees_no_401_at_the_gateway() {
    check_script(&HTTPX, Way::Gateway, "httpx_client.py", "httpx").await;
}

#[tokio::test]
async fn aiohttp_with_trust_env_sees_no_401_through_the_proxy() {
    check_script(&AIOHTTP, Way::Proxy, "aiohttp_client.py", "aiohttp").await;
}

#[tokio::test]
async fn aiohttp_without_trust_env_sees_no_401_at_the_gateway() {
    check_script(&AIOHTTP, Way::Gateway, "aiohttp_plain.py", "aiohttp").await;
}

#[tokio::test]
async fn aiohttp_without_trust_env_sees_no_401_behind_the_alias() {
    check_script(&AIOHTTP, Way::Alias, "aiohttp_plain.py", "aiohttp").await;
}

#[tokio::test]
async fn scrapy_sees_no_401_through_the_proxy() {
    check_script(&SCRAPY, Way::Proxy, "scrapy_spider.py", "scrapy").await;
}

#[tokio::test]
async fn scrapy_sees_no_401_at_the_gateway() {
    check_script(&SCRAPY, Way::Gateway, "scrapy_spider.py", "scrapy").await;
}

#[tokio::test]
async fn curl_cffi_sees_no_401_through_the_proxy() {
    check_script(&CURL_CFFI, Way::Proxy, "curl_cffi_client.py", "curl_cffi").await;
}

#[tokio::test]
async fn curl_cffi_sees_no_401_at_the_gateway() {
    check_script(&CURL_CFFI, Way::Gateway, "curl_cffi_client.py", "curl_cffi").await;
}

#[tokio::test]
async fn urllib_sees_no_401_behind_the_alias() {
    check_script(&URLLIB, Way::Alias, "urllib_client.py", "urllib").await;
}

#[tokio::test]
async fn httpx_sees_no_401_behind_the_alias() {
    check_script(&HTTPX, Way::Alias, "httpx_client.py", "httpx").await;
}

#[tokio::test]
async fn httpx_that_offers_http_2_sees_no_401_behind_the_alias() {
    check_script(&HTTPX, Way::Alias, "httpx_http2.py", "httpx, h2").await;
}

#[tokio::test]
async fn scrapy_sees_no_401_behind_the_alias() {
    check_script(&SCRAPY, Way::Alias, "scrapy_spider.py", "scrapy").await;
}

#[tokio::test]
async fn curl_cffi_sees_no_401_behind_the_alias() {
    check_script(&CURL_CFFI, Way::Alias, "curl_cffi_client.py", "curl_cffi").await;
}
