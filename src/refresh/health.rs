//! How Redis fares, with reading and writing apart.
//!
//! # Invariants
//!
//! - What failed counts until it works again. So a server that can be read and
//!   takes no writes, full or a replica, is out of order all the while.
//! - A person is told of each trouble once, however often it shows.

use tracing::{info, warn};

use crate::token::{RedisTrouble, StoreError};

/// What was done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Access {
    Reading,
    Writing,
}

/// The last error of each access, until it works again.
#[derive(Debug, Default)]
pub(super) struct RedisHealth {
    reading: Option<StoreError>,
    writing: Option<StoreError>,
}

impl RedisHealth {
    /// Takes in how an access ended, and logs what is news.
    pub(super) fn note(&mut self, access: Access, error: Option<StoreError>) {
        let before = self.trouble();
        match access {
            Access::Reading => self.reading = error,
            Access::Writing => self.writing = error,
        }
        match self.error() {
            Some(error) if before != self.trouble() => {
                warn!(store = "redis", %error, "store out of order");
            }
            None if before.is_some() => info!(store = "redis", "store in order again"),
            _ => {}
        }
    }

    /// Nothing is to be written for now. A refusal counts on, since only a write
    /// can show that it has ended; anything else shows in reading, too.
    pub(super) fn note_idle(&mut self) {
        let writing = self.writing.as_ref().map(StoreError::redis_trouble);
        if writing.is_some_and(|trouble| trouble != RedisTrouble::Refusal) {
            self.note(Access::Writing, None);
        }
    }

    /// What does not work.
    pub(super) fn error(&self) -> Option<&StoreError> {
        self.reading.as_ref().or(self.writing.as_ref())
    }

    /// The same, as far as a person has to do something else about it.
    pub(super) fn trouble(&self) -> Option<RedisTrouble> {
        self.error().map(StoreError::redis_trouble)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_takes_no_writes_is_out_of_order_while_it_can_be_read() {
        let mut health = RedisHealth::default();
        health.note(Access::Writing, Some(StoreError::RedisRefused { code: "OOM".into() }));
        health.note(Access::Reading, None);
        assert_eq!(health.trouble(), Some(RedisTrouble::Refusal));
        health.note(Access::Reading, Some(StoreError::RedisTimeout));
        assert_eq!(health.trouble(), Some(RedisTrouble::Away));
        health.note(Access::Reading, None);
        assert_eq!(health.trouble(), Some(RedisTrouble::Refusal));
        health.note_idle();
        assert_eq!(health.trouble(), Some(RedisTrouble::Refusal));
        health.note(Access::Writing, None);
        assert_eq!(health.trouble(), None);
    }

    #[test]
    fn a_write_that_hung_is_forgotten_when_nothing_is_to_be_written() {
        let mut health = RedisHealth::default();
        health.note(Access::Writing, Some(StoreError::RedisTimeout));
        health.note_idle();
        assert_eq!(health.trouble(), None);
    }
}
