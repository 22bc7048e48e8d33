//! The sidecar as a black box: the real binary among real neighbours on loopback.

#![allow(clippy::unwrap_used, reason = "in a test an unmet expectation is a failure")]
#![allow(clippy::disallowed_methods, reason = "the environment here is that of the test run")]

mod support;

mod access;
mod admin;
mod alias;
mod architecture;
mod authority;
mod authorization;
mod bounds;
mod clients;
mod commands;
mod commands_env;
mod crowd;
mod differential;
mod dns;
mod doctor;
mod documents;
mod drain;
mod egress;
mod expect;
mod faults;
mod fidelity;
mod fleet;
mod gate;
mod guide;
mod herd;
mod hints;
mod hold;
mod kubernetes;
mod limits;
mod parent;
mod redis_rights;
mod redis_states;
mod refusal;
mod replay;
mod resumption;
mod routes;
mod secrets;
mod sessions;
mod sni;
mod soak;
mod sources;
mod stalls;
mod stores;
mod streams;
mod supply;
mod tokens_way;
mod upstream;
mod wall;
mod websocket;
