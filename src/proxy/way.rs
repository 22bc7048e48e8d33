//! Where a request leads: its route, and the upstream or the answer at the end
//! of it.

use std::future::ready;
use std::pin::Pin;
use std::rc::Rc;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, PROXY_AUTHORIZATION, USER_AGENT};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, Uri};
use hyper::body::Incoming;

use super::body::AnswerBody;
use super::credentials::{presents, presents_any, without_basic};
use super::error::ProxyError;
use super::forward::{Exchange, Outbound, count_hop};
use super::head::{Head, Subject};
use super::intercept::Tunnelled;
use super::service::{Answer, ClientConnection, Next, Service};
use super::{Proxy, gate};
use crate::config::normalize_host;
use crate::hints::{self, Hint, LocalHost};
use crate::metrics::Route;
use crate::net::{DialError, Reach, Spelling, UpstreamKey};

const WELL_KNOWN_CA: &str = "/.well-known/token-sidecar/ca.pem";
const WELL_KNOWN_BUNDLE: &str = "/.well-known/token-sidecar/ca-bundle.pem";

/// An answer that is made here or comes from an upstream. In a box: the memory of
/// a request is that of its connection only while it lasts.
///
/// Fails where none comes about, or the request's hold has ended.
pub(super) type Coming<'a> = Pin<Box<dyn Future<Output = Result<Answer, ProxyError>> + 'a>>;

impl Service {
    /// The answer to a CONNECT: an API host is intercepted, another one dialled.
    pub(super) fn connect(
        &self,
        mut request: Request<Incoming>,
        head: Result<Head, ProxyError>,
        route: &mut Route,
        client: &Rc<ClientConnection>,
    ) -> Result<Coming<'_>, ProxyError> {
        let on_upgrade = hyper::upgrade::on(&mut request);
        let (parts, _, _) = passed(request, head, client)?;
        self.check_proxy_auth(&parts)?;
        let Some((host, port)) = address_of(&parts.uri, None) else {
            return Err(ProxyError::BadRequest("CONNECT takes host:port as its target"));
        };
        let opened = || Ok(Response::new(AnswerBody::made("")));
        if let Some(origin) = self.proxy.origins.by_address(&host, port) {
            *route = Route::Intercept;
            let by_doctor = parts.headers.get(USER_AGENT) == Some(&hints::DOCTOR);
            let tunnelled = Tunnelled { host, origin, route: *route, by_doctor };
            client.becomes(on_upgrade, Next::Intercept(tunnelled));
            return Ok(Box::pin(ready(opened())));
        }
        let client = Rc::clone(client);
        Ok(Box::pin(async move {
            let upstream = self.proxy.dialer.tcp(&host, port, Reach::Client).await;
            let upstream = upstream.inspect_err(|error| self.proxy.hint_at_local(&host, error))?;
            client.becomes(on_upgrade, Next::Tunnel(upstream));
            opened()
        }))
    }

    /// The answer to a request that is no CONNECT.
    pub(super) fn answer(
        &self,
        request: Request<Incoming>,
        head: Result<Head, ProxyError>,
        route: &mut Route,
        client: &Rc<ClientConnection>,
    ) -> Result<Coming<'_>, ProxyError> {
        let (mut parts, body, head) = passed(request, head, client)?;
        let to = if parts.uri.scheme().is_some() {
            self.absolute(&mut parts, head.subject, route)?
        } else if let Some(file) = self.well_known(&parts) {
            return Ok(Box::pin(ready(Ok(file))));
        } else {
            self.gateway(&mut parts)?
        };
        self.to_upstream(parts, head.spelling, body, to, client)
    }

    /// The answer of an upstream to a request that passed the gate and whose target
    /// is in origin-form or `*`.
    pub(super) fn to_upstream(
        &self,
        mut parts: Parts,
        spelling: Spelling,
        body: Incoming,
        to: Outbound,
        client: &Rc<ClientConnection>,
    ) -> Result<Coming<'_>, ProxyError> {
        Ok(match count_hop(&mut parts)? {
            Some(answer) => Box::pin(ready(Ok(answer))),
            None => Exchange::new(&self.proxy, parts, spelling, body, to, client).run(),
        })
    }

    /// An absolute-form target: to the API with the token, else without.
    fn absolute(
        &self,
        parts: &mut Parts,
        subject: Subject,
        route: &mut Route,
    ) -> Result<Outbound, ProxyError> {
        self.check_proxy_auth(parts)?;
        let uri = std::mem::take(&mut parts.uri);
        parts.uri = subject.target(&uri);
        let tls = uri.scheme_str() == Some("https");
        let default_port = if tls { 443 } else { 80 };
        let plain = |authority| self.proxy.origins.by_plain(authority, default_port);
        if let Some(origin) = uri.authority().and_then(plain) {
            return Ok(self.to_api(origin));
        }
        let Some((host, port)) = address_of(&uri, Some(default_port)) else {
            return Err(ProxyError::BadRequest("the target names no host"));
        };
        if let Some(origin) = self.proxy.origins.by_address(&host, port) {
            return Ok(self.to_api(origin));
        }
        *route = Route::Passthrough;
        Ok(Outbound {
            upstream: self.other(UpstreamKey { host, port, tls, reach: Reach::Client }),
            // RFC 9112 §3.2.2: the target's authority is the Host.
            host: uri.authority().and_then(|it| HeaderValue::try_from(it.as_str()).ok()),
            with_token: false,
            observed: false,
        })
    }

    /// The files for a parser's trust.
    fn well_known(&self, parts: &Parts) -> Option<Answer> {
        let settings = &self.proxy.settings;
        match parts.uri.path() {
            WELL_KNOWN_CA => Some(pem_file(&parts.method, &settings.ca_pem)),
            WELL_KNOWN_BUNDLE => Some(pem_file(&parts.method, &settings.bundle_pem)),
            _ => None,
        }
    }

    /// An origin-form target: the gateway.
    fn gateway(&self, parts: &mut Parts) -> Result<Outbound, ProxyError> {
        if let Some(expected) = &self.proxy.settings.proxy_auth {
            let headers = &parts.headers;
            let fields = [&AUTHORIZATION, &PROXY_AUTHORIZATION];
            if !fields.iter().any(|field| presents(headers, field, expected)) {
                let given = fields.iter().any(|field| presents_any(headers, field));
                return Err(ProxyError::AuthRequired { gateway: true, given });
            }
            parts.headers = without_basic(headers, expected);
        }
        let path = parts.uri.path();
        let origin = self.proxy.origins.by_gateway(parts.headers.get(HOST), path);
        origin
            .map(|origin| self.to_api(origin))
            .ok_or_else(|| ProxyError::NoSuchOrigin { path: path.to_owned() })
    }

    /// The way to API origin `index`, with the `Host` that it expects.
    fn to_api(&self, index: usize) -> Outbound {
        Outbound {
            upstream: Rc::clone(self.api(index)),
            host: Some(self.proxy.origins.host_field(index).clone()),
            with_token: true,
            observed: false,
        }
    }

    fn check_proxy_auth(&self, parts: &Parts) -> Result<(), ProxyError> {
        match &self.proxy.settings.proxy_auth {
            Some(expected) if !presents(&parts.headers, &PROXY_AUTHORIZATION, expected) => {
                let given = presents_any(&parts.headers, &PROXY_AUTHORIZATION);
                Err(ProxyError::AuthRequired { gateway: false, given })
            }
            _ => Ok(()),
        }
    }
}

impl Proxy {
    /// Tells of a host that no client should reach through a proxy, unless the
    /// operator lets it.
    pub(super) fn hint_at_local(&self, host: &str, error: &DialError) {
        // One that is allowed can at worst be down.
        if !matches!(error, DialError::Connect { .. } | DialError::Timeout { .. })
            && let Some(host) = LocalHost::of(host)
        {
            self.hints.tell(&Hint::NoProxy(host));
        }
    }
}

/// The pieces of a request that `client` has sent, and what is known of its head,
/// if it passes the gate.
///
/// # Errors
///
/// What is wrong with its `head`, as it came or as the gate sees it.
pub(super) fn passed(
    request: Request<Incoming>,
    head: Result<Head, ProxyError>,
    client: &ClientConnection,
) -> Result<(Parts, Incoming, Head), ProxyError> {
    let (parts, body) = request.into_parts();
    client.request_came(&parts, &body);
    let head = head?;
    gate::check(&parts)?;
    Ok((parts, body, head))
}

pub(super) fn route_of(method: &Method, uri: &Uri) -> Route {
    if method == Method::CONNECT {
        Route::Tunnel
    } else if uri.scheme().is_some() {
        Route::Absolute
    } else {
        Route::Gateway
    }
}

/// The normalized host and the port that `uri` leads to.
pub(super) fn address_of(uri: &Uri, default_port: Option<u16>) -> Option<(String, u16)> {
    let authority = uri.authority()?;
    Some((normalize_host(authority.host()), authority.port_u16().or(default_port)?))
}

fn pem_file(method: &Method, pem: &bytes::Bytes) -> Answer {
    const ALLOWED: HeaderValue = HeaderValue::from_static("GET, HEAD");
    if method != Method::GET && method != Method::HEAD {
        let mut answer = ProxyError::BadRequest("this file can only be read").into_response();
        *answer.status_mut() = http::StatusCode::METHOD_NOT_ALLOWED;
        answer.headers_mut().insert(http::header::ALLOW, ALLOWED);
        return answer;
    }
    let mut answer = Response::new(AnswerBody::made(pem.clone()));
    let kind = HeaderValue::from_static("application/x-pem-file");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}
