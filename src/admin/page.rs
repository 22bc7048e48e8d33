//! The page for a person, and the policy that keeps it to itself.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use sha2::{Digest as _, Sha256};

use super::answer::{self, Answer};

const HTML: &str = include_str!("page.html");

/// The page with its policy, computed once.
#[derive(Debug)]
pub(super) struct Page {
    policy: HeaderValue,
}

impl Page {
    pub(super) fn new() -> Self {
        // The policy is made of base64 and fixed words, so it is a valid field value.
        let policy = HeaderValue::try_from(policy()).unwrap_or(HeaderValue::from_static("sandbox"));
        Self { policy }
    }

    pub(super) fn answer(&self) -> Answer {
        let kind = HeaderValue::from_static("text/html; charset=utf-8");
        let mut answer = answer::new(StatusCode::OK, kind, Bytes::from_static(HTML.as_bytes()));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
        answer
    }
}

/// Allows the page's own script and style, by hash, and requests to its own
/// origin: nothing else, whatever finds its way into the page.
fn policy() -> String {
    format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style"),
    )
}

fn hash(element: &str) -> String {
    let text = inside(element).unwrap_or_default();
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

/// The text of the page's one element of that name.
fn inside(element: &str) -> Option<&'static str> {
    let (_, rest) = HTML.split_once(&format!("<{element}>"))?;
    rest.split_once(&format!("</{element}>")).map(|(text, _)| text)
}

#[cfg(test)]
mod tests {
    use super::{HTML, Page, inside};
    use http::header;

    #[test]
    fn the_policy_names_the_script_and_the_style() {
        assert!(inside("script").is_some_and(|script| script.contains("fetch(")));
        assert!(inside("style").is_some_and(|style| style.contains("prefers-color-scheme")));
        let answer = Page::new().answer();
        let policy = answer.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert_eq!(policy.matches("'sha256-").count(), 2, "{policy}");
        assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    }

    #[test]
    fn the_page_needs_nothing_that_the_policy_forbids() {
        assert_eq!(HTML.matches("<script").count(), 1);
        assert_eq!(HTML.matches("<style").count(), 1);
        for forbidden in
            [" src=", " style=", " onclick=", "http://", "https://", "@import", "innerHTML"]
        {
            assert!(!HTML.contains(forbidden), "{forbidden}");
        }
    }
}
