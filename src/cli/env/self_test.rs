//! A command for inside a parser's container that says whether proxy,
//! certificate and token work there: Python 3.6 or later, no packages.

use http::Uri;
use serde_json::Value;

use super::format::shell_quoted;

/// What comes after `url = "…"`. One statement an entry, none of which is
/// compound, so that it all fits into a line. An uncaught exception is told by
/// the hook and ends Python with exit code 1, as `sys.exit` with a text does.
///
/// `Authorization` is sent since `AUTHORIZATION=present` replaces only what is there.
const STATEMENTS: [&str; 9] = [
    r#"q = u.Request(url, headers={"Authorization": "Bearer x", "User-Agent": "Mozilla/5.0"})"#,
    r#"proxy = u.getproxies().get("https", "")"#,
    r#"ca = os.environ.get("SSL_CERT_FILE", "")"#,
    r#"words = {401: "token refused", 503: "no token, or no room"}"#,
    r#"why = lambda e: "%s: HTTP %s %s %s" % (words.get(e.code, "unexpected answer"), e.code, e.headers.get("Proxy-Status", ""), e.read(500).decode("utf-8", "replace")) if hasattr(e, "code") else "certificate not trusted: SSL_CERT_FILE=%s, %s: %s" % (ca, "a file" if os.path.isfile(ca) else "no file there", e) if "CERTIFICATE_VERIFY_FAILED" in str(e) else "the proxy refuses: %s" % e if "Tunnel connection failed" in str(e) else "proxy not reachable: %s: %s" % (proxy.split("@")[-1], e)"#,
    r#"sys.excepthook = lambda kind, e, trace: print("FAILED: " + why(e), file=sys.stderr)"#,
    r#"proxy or sys.exit("FAILED: proxy variables missing: https_proxy is not set here")"#,
    r#"u.proxy_bypass(q.host) and sys.exit("FAILED: no_proxy names %s, so the proxy is passed by" % q.host)"#,
    r#"print("OK: proxy, certificate and token work: HTTP %d" % u.urlopen(q, timeout=90).status)"#,
];

/// The command, one line for `sh`. It asks `verify_url` through the proxy of
/// its environment and prints one line; exit code 0 if all is well, else 1.
pub(super) fn command(verify_url: &Uri) -> String {
    // A JSON string is one of Python's, too.
    let url = Value::String(verify_url.to_string());
    let program =
        format!("import os, sys, urllib.request as u; url = {url}; {}", STATEMENTS.join("; "));
    format!("python3 -c {}", shell_quoted(&program))
}
