//! The fields by which our own requests look like those of the shop's site.

use http::header;
use http::request::Builder;

/// What the requests call themselves.
pub(super) const USER_AGENT: &str = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 \
                          (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36";

/// A request that the site's script makes.
pub(super) fn api(request: Builder) -> Builder {
    common(request)
        .header(header::ACCEPT, "application/json, text/plain, */*")
        .header("initial-feature", "index")
        .header("platform", "desktop")
        .header("shop-brand", "chitaiGorod")
}

/// A request for a page.
pub(super) fn page(request: Builder) -> Builder {
    common(request).header(header::ACCEPT, "text/html,application/xhtml+xml,*/*;q=0.8")
}

/// A random UUID, version 4: the site gives each visitor one.
pub(super) fn user_id() -> String {
    let bits = fastrand::u128(..);
    let (version, variant) = (0x4 << 76, 0x8 << 60);
    let hex = format!("{:032x}", bits & !(0xf << 76) & !(0xc << 60) | version | variant);
    let part = |range| hex.get(range).unwrap_or_default();
    let parts = [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)];
    parts.join("-")
}

fn common(request: Builder) -> Builder {
    request
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::ACCEPT_LANGUAGE, "ru-RU,ru;q=0.9,en;q=0.8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_id_is_a_random_uuid_of_version_4() {
        let id = user_id();
        assert_eq!(id.len(), 36);
        assert_eq!(id.as_bytes()[14], b'4');
        assert!(matches!(id.as_bytes()[19], b'8' | b'9' | b'a' | b'b'));
        assert_ne!(id, user_id());
    }
}
