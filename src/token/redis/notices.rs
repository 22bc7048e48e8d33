//! Notices by which sidecars that share a Redis tell each other to look there.
//!
//! # Invariants
//!
//! - Each notice, and each subscription, the first and every later one, gives a
//!   signal: what happened while there was none is seen then.
//! - A notice says only that there is something to see; what, is read.
//! - A server that has fallen silent is noticed within [`SILENCE`] and a second.
//!   Not all sidecars ask for a sign of life at one moment.
//!   Then a random pause of up to 5 s goes before each try, so that a thousand
//!   sidecars do not come back at one moment.

use std::{convert::Infallible, time::Duration};

use futures_util::StreamExt as _;
use redis::aio::PubSubSink;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{RedisStore, StoreError, link::STEP_LIMIT, link::explained, pause};

/// How long nothing need be heard, at most, before the server is asked for a sign
/// of life.
pub(super) const SILENCE: Duration = Duration::from_secs(10);

impl RedisStore {
    /// A number that changes at each notice and with each subscription: then it
    /// is worth a look. Notices that come together change it once.
    pub fn notices(&self) -> watch::Receiver<u64> {
        self.notices.subscribe()
    }

    /// Follows the notices for as long as it is polled, through all failures.
    ///
    /// Logs once in a row that the server gives none.
    pub async fn follow_notices(&self) {
        let mut told = false;
        loop {
            let before = *self.notices.borrow();
            let Err(error) = self.listen().await;
            debug!(%error, "no notices from redis for now");
            told &= *self.notices.borrow() == before;
            if let (StoreError::RedisRefused { .. }, false) = (&error, told) {
                warn!(%error, channel = self.keys.channel(), "redis gives no notices");
                told = true;
            }
            sleep(pause::random(pause::LONGEST)).await;
        }
    }

    /// Until the subscription ends.
    async fn listen(&self) -> Result<Infallible, StoreError> {
        let (mut sink, mut notices) = self.link.follow(self.keys.channel()).await?.split();
        self.signal();
        loop {
            let patience = SILENCE.mul_f64(0.75 + 0.25 * fastrand::f64());
            match timeout(patience, notices.next()).await {
                Ok(Some(_)) => self.signal(),
                Ok(None) => return Err(StoreError::RedisConnection { reason: "closed".into() }),
                Err(_) => ping(&mut sink).await?,
            }
        }
    }

    fn signal(&self) {
        self.notices.send_modify(|count| *count = count.wrapping_add(1));
    }
}

async fn ping(sink: &mut PubSubSink) -> Result<(), StoreError> {
    let answer = timeout(STEP_LIMIT, sink.ping::<redis::Value>()).await;
    let answer = answer.map_err(|_| StoreError::RedisTimeout)?;
    answer.map(|_| ()).map_err(|error| explained(&error))
}
