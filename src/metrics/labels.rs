//! Label values: closed sets, so that counting by them is indexing an array.

/// By which way a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// Inside an intercepted `CONNECT` to an API host.
    Intercept,
    /// Absolute-form, to an API host.
    Absolute,
    /// Origin-form, to an API origin by `Host` or path prefix.
    Gateway,
    /// A blind tunnel to another host.
    Tunnel,
    /// TLS on `SNI_LISTEN`.
    Sni,
    /// Absolute-form, to another host: forwarded without a token.
    Passthrough,
}

impl Route {
    /// Every route, in the order of its discriminants.
    pub const ALL: [Self; 6] = [
        Self::Intercept,
        Self::Absolute,
        Self::Gateway,
        Self::Tunnel,
        Self::Sni,
        Self::Passthrough,
    ];

    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Intercept => "intercept",
            Self::Absolute => "absolute",
            Self::Gateway => "gateway",
            Self::Tunnel => "tunnel",
            Self::Sni => "sni",
            Self::Passthrough => "passthrough",
        }
    }
}

/// A bound that turned something away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// `MAX_CONNECTIONS`.
    Connections,
    /// `MAX_CLIENT_CONNECTIONS`.
    ClientConnections,
    /// `MAX_HELD`.
    Held,
    /// `REPLAY_BODY_LIMIT`: a body too large to keep.
    ReplayBody,
    /// `REPLAY_MEMORY`: no room to keep another body.
    ReplayMemory,
    /// A client that did not finish its TLS handshake in time.
    HandshakeTime,
    /// A client that did not finish the head of a request in time.
    HeadTime,
    /// `UPSTREAM_CONNECTIONS`: none came free in time.
    UpstreamConnections,
    /// TLS handshakes of clients at once.
    Handshakes,
    /// Memory of all half heads together.
    HeadMemory,
    /// A client that rested too long between two requests.
    ClientIdle,
    /// A client that stopped giving the body of its request.
    BodyStall,
    /// An answer that stood still: the upstream gave none of it, or the client
    /// took none.
    AnswerStall,
    /// A tunnel in which nothing moved.
    TunnelIdle,
    /// The system's limit of open files: a client not accepted, a connection
    /// not opened.
    Descriptors,
    /// `CLIENT_NETWORKS`: a client from elsewhere.
    ClientNetworks,
    /// Names of clients' destinations that the system looks up at once.
    Lookups,
}

impl Limit {
    /// Every limit, in the order of its discriminants.
    pub const ALL: [Self; 17] = [
        Self::Connections,
        Self::ClientConnections,
        Self::Held,
        Self::ReplayBody,
        Self::ReplayMemory,
        Self::HandshakeTime,
        Self::HeadTime,
        Self::UpstreamConnections,
        Self::Handshakes,
        Self::HeadMemory,
        Self::ClientIdle,
        Self::BodyStall,
        Self::AnswerStall,
        Self::TunnelIdle,
        Self::Descriptors,
        Self::ClientNetworks,
        Self::Lookups,
    ];

    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ClientConnections => "client_connections",
            Self::Held => "held",
            Self::ReplayBody => "replay_body",
            Self::ReplayMemory => "replay_memory",
            Self::HandshakeTime => "handshake_time",
            Self::HeadTime => "head_time",
            Self::UpstreamConnections => "upstream_connections",
            Self::Handshakes => "handshakes",
            Self::HeadMemory => "head_memory",
            Self::ClientIdle => "client_idle",
            Self::BodyStall => "body_stall",
            Self::AnswerStall => "answer_stall",
            Self::TunnelIdle => "tunnel_idle",
            Self::Descriptors => "descriptors",
            Self::ClientNetworks => "client_networks",
            Self::Lookups => "lookups",
        }
    }
}

/// How a replay, or the wish for one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplayOutcome {
    /// The second send got an answer other than 401.
    Answered,
    /// The second send got a 401 too.
    RefusedAgain,
    /// There was no second send, since the refresh failed or the hold ended
    /// before it, or it got no answer.
    Failed,
    /// The request's body was not kept, so there was no second send.
    NotReplayable,
}

impl ReplayOutcome {
    /// Every outcome, in the order of its discriminants.
    pub const ALL: [Self; 4] =
        [Self::Answered, Self::RefusedAgain, Self::Failed, Self::NotReplayable];

    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::RefusedAgain => "refused_again",
            Self::Failed => "failed",
            Self::NotReplayable => "not_replayable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Limit, ReplayOutcome, Route};

    #[test]
    fn the_lists_are_in_the_order_of_the_discriminants() {
        assert!(Route::ALL.iter().enumerate().all(|(i, &route)| route as usize == i));
        assert!(Limit::ALL.iter().enumerate().all(|(i, &limit)| limit as usize == i));
        assert!(ReplayOutcome::ALL.iter().enumerate().all(|(i, &outcome)| outcome as usize == i));
    }
}
