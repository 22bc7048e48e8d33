//! Sockets: worker threads, the accept loop, name resolution, dialling, upstream
//! connections.
//!
//! # Invariants
//!
//! - A client connection and the upstream connections that serve it live on
//!   one worker thread; nothing is locked or handed over per request.
//! - An address is checked against the egress policy after resolution, and the
//!   checked address is the one dialled.
//! - The process's own listeners are never dialled.

mod buffers;
mod descriptors;
mod dial;
mod egress;
mod fetch;
mod guarded;
mod head;
mod parent;
mod read_ahead;
mod relay;
mod resolve;
mod seat;
mod spelling;
mod upstream;
mod workers;

pub use descriptors::{check_descriptor_limit, raise_descriptor_limit};
pub use dial::{DialError, Dialer, Found, Reach, UpstreamStream, Ways};
pub use egress::Egress;
pub use fetch::{FetchError, origin_form};
pub use guarded::Guarded;
pub use head::{end_of_head, is_blank, lines};
pub use parent::ParentError;
pub use relay::relay;
pub use resolve::{NoAnswer, ResolveError, Resolver, Servers};
pub use spelling::{NextHead, Respelled, Slot, Spelling};
pub use upstream::{Place, PooledBody, SendError, Upstream, UpstreamKey};
pub use workers::{Admitted, Client, ClientLimits, Door, Refusals, Worker, Workers};
