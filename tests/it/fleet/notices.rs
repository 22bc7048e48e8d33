//! What the fleet tells itself on the channel in Redis.

use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::EVENTS;
use crate::support::redis::Redis;

/// Each notice and when it came. It is listened until this is dropped.
pub(super) struct Notices {
    heard: Arc<Mutex<Vec<(Instant, Value)>>>,
    _stop: DropGuard,
}

impl Notices {
    /// Hears what is published from now on.
    pub(super) async fn on(redis: &Redis) -> Self {
        let client = redis::Client::open(redis.url()).unwrap();
        let mut channel = client.get_async_pubsub().await.unwrap();
        channel.subscribe(EVENTS).await.unwrap();
        let heard = Arc::<Mutex<Vec<_>>>::default();
        let (stop, kept) = (CancellationToken::new(), heard.clone());
        let listen = async move {
            let mut messages = channel.into_on_message();
            while let Some(message) = messages.next().await {
                let notice = serde_json::from_slice(message.get_payload_bytes()).unwrap();
                kept.lock().unwrap().push((Instant::now(), notice));
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(listen));
        Self { heard, _stop: stop.drop_guard() }
    }

    /// When each notice of this `event` came.
    pub(super) fn times_of(&self, event: &str) -> Vec<Instant> {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|(_, notice)| notice["event"] == event).map(|(at, _)| *at).collect()
    }

    /// All notices as one text.
    pub(super) fn text(&self) -> String {
        let heard = self.heard.lock().unwrap();
        heard.iter().map(|(_, notice)| notice.to_string()).collect::<Vec<_>>().join("\n")
    }
}
