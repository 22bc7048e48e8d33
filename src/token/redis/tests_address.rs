//! Settings that lead elsewhere than they say.

use super::tests::{NOW, Server, published, settings, timed};
use super::tests_sentinel::Sentinel;
use super::*;
use crate::token::RedisTrouble;

fn refusal(settings: RedisSettings) -> StoreError {
    let shown = settings.url.expose().to_owned();
    RedisStore::new(settings).err().unwrap_or_else(|| panic!("{shown} is accepted"))
}

/// What each way to ask the server ends with.
async fn errors(url: &str) -> [StoreError; 3] {
    let store = || RedisStore::new(settings(url)).unwrap();
    [
        timed(store().ping()).await.unwrap_err(),
        timed(store().load()).await.unwrap_err(),
        timed(store().save(&published(true), NOW)).await.unwrap_err(),
    ]
}

#[test]
fn the_cookies_have_a_key_of_their_own() {
    for (key, cookies_key) in [
        ("x", "x"),
        ("x", "{x}:meta"),
        ("x", "{x}:lease"),
        ("x", "{x}:epoch"),
        ("x", "{x}:unverified"),
        ("x", "{x}:backoff"),
        ("x", "{x}:denied"),
        ("x", "{x}:tries"),
        ("x", "{x}:waiting"),
        ("chitai_gorod_cookies", "chitai_gorod_cookies"),
    ] {
        let mut settings = settings("redis://host");
        (settings.key, settings.cookies_key) = (key.into(), cookies_key.into());
        let error = refusal(settings);
        assert_eq!(error.variable(), "REDIS_COOKIES_KEY", "{cookies_key}");
    }
    for cookies_key in ["{x}:cookies", "x:meta", "{x}", "{y}:meta"] {
        let mut settings = settings("redis://host");
        (settings.key, settings.cookies_key) = ("x".into(), cookies_key.into());
        assert!(RedisStore::new(settings).is_ok(), "{cookies_key}");
    }
}

#[test]
fn what_a_url_says_in_vain_is_refused() {
    for (url, expected) in [
        ("redis://:hidden@host/?db=3", "only unix:// takes"),
        ("rediss://:hidden@host/2?db=hidden", "only unix:// takes"),
        ("redis+sentinel://:hidden@host/service?db=3", "only unix:// takes"),
        ("unix:///path?database=3&pass=hidden", "only unix:// takes"),
        ("redis+sentinel://hidden@one,hidden@two/service", "before the first Sentinel"),
        ("redis+sentinel://one,hidden@two/service", "before the first Sentinel"),
        ("redis+sentinel://:hid@den@one,two/service", "before the first Sentinel"),
        ("redis://:hidden@host/-1", "not of the form"),
        ("unix:///path?db=-1&pass=hidden", "not of the form"),
        ("redis+sentinel://:hidden@host/service/-1", "not of the form"),
    ] {
        let error = refusal(settings(url));
        assert_eq!(error.variable(), "REDIS_URL");
        assert!(error.to_string().contains(expected), "{url}: {error}");
        assert!(!format!("{error} {error:?}").contains("hid"), "{url}");
    }
    for url in [
        "unix:///path?db=3&user=name&pass=word&protocol=resp3",
        "redis+sentinel://us%40er:p%2Css%40@one,two/service",
        "redis://:p@ss@host/2",
    ] {
        assert!(RedisStore::new(settings(url)).is_ok(), "{url}");
    }
}

#[tokio::test]
async fn a_password_that_is_missing_is_said_to_be_so_whatever_the_database() {
    let server = Server::start(&["--requirepass", "right"]).await;
    for database in ["", "/0", "/3", "/99"] {
        for error in errors(&format!("redis://127.0.0.1:{}{database}", server.port)).await {
            assert!(matches!(error, StoreError::RedisPassword), "{database}: {error}");
        }
    }
}

#[tokio::test]
async fn a_database_that_the_server_does_not_have_is_said_to_be_missing() {
    let server = Server::start(&[]).await;
    for error in errors(&format!("redis://127.0.0.1:{}/99", server.port)).await {
        assert!(error.to_string().contains("no database"), "{error}");
        assert_eq!(error.redis_trouble(), RedisTrouble::Address);
    }
    let _: () = server.command(&["ACL", "SETUSER", "default", "-select"]).await;
    for error in errors(&format!("redis://127.0.0.1:{}/3", server.port)).await {
        assert!(matches!(&error, StoreError::RedisRefused { code } if code == "NOPERM"), "{error}");
    }
}

#[tokio::test]
async fn a_sentinel_where_a_server_should_be_is_said_to_be_one() {
    let server = Server::start(&[]).await;
    let sentinel = Sentinel::of(server.port).await;
    for database in ["/3", ""] {
        let url = format!("redis://127.0.0.1:{}{database}", sentinel.port);
        let store = RedisStore::new(settings(&url)).unwrap();
        for error in [
            timed(store.load()).await.unwrap_err(),
            timed(store.save(&published(true), NOW)).await.unwrap_err(),
        ] {
            assert!(error.to_string().contains("redis+sentinel://"), "{error}");
            assert_eq!(error.redis_trouble(), RedisTrouble::Address);
        }
    }
}

#[tokio::test]
async fn a_server_where_a_sentinel_should_be_is_said_to_be_none() {
    let server = Server::start(&[]).await;
    for database in ["/3", ""] {
        let url = format!("redis+sentinel://127.0.0.1:{}/shop{database}", server.port);
        for error in errors(&url).await {
            assert!(error.to_string().contains("no Sentinel answers"), "{error}");
            assert_eq!(error.redis_trouble(), RedisTrouble::Address);
        }
    }
}
