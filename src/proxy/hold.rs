//! Holding a request while its token is renewed.

use std::pin::pin;

use futures_util::future::poll_immediate;
use tokio::time::{Instant, sleep_until};

use super::Proxy;
use super::error::ProxyError;
use crate::metrics::Limit;

/// When the hold of one request ends at the latest; set when it first waits.
#[derive(Default)]
pub(super) struct Deadline(Option<Instant>);

impl Proxy {
    /// Waits for `wait`: counted, up to `deadline`, and not beyond the drain.
    /// What is ready at once is no hold. Dropping the future ends the hold and
    /// nothing else.
    ///
    /// # Errors
    ///
    /// [`ProxyError::TooManyHeld`], [`ProxyError::HoldTimeout`] or
    /// [`ProxyError::Draining`].
    pub(super) async fn hold<T>(
        &self,
        deadline: &mut Deadline,
        wait: impl Future<Output = T>,
    ) -> Result<T, ProxyError> {
        let mut wait = pin!(wait);
        if let Some(ready) = poll_immediate(wait.as_mut()).await {
            return Ok(ready);
        }
        let Some(_held) = self.metrics.hold().try_enter(self.settings.max_held) else {
            self.metrics.limited(Limit::Held);
            return Err(ProxyError::TooManyHeld { retry_after: self.refresher.retry_after() });
        };
        let limit = self.settings.hold_timeout;
        let end = *deadline.0.get_or_insert_with(|| Instant::now() + limit);
        tokio::select! {
            biased;
            done = wait => Ok(done),
            () = self.release_held.cancelled() => Err(ProxyError::Draining),
            () = sleep_until(end) => Err(ProxyError::HoldTimeout {
                limit,
                status: self.settings.retry_status,
                retry_after: self.refresher.expected_wait(),
            }),
        }
    }
}
