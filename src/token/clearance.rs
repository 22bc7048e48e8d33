//! What goes with a token where the anti-bot wall lets nobody else pass.

use http::HeaderValue;

use super::Cookies;

/// Cookies and user-agent that a browser passed the wall with. They count only
/// together, and only from the address that the browser had.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Clearance {
    cookies: Cookies,
    user_agent: Option<HeaderValue>,
}

impl Clearance {
    /// A user-agent that no field can hold is left out.
    #[must_use]
    pub fn new(cookies: Cookies, user_agent: Option<&str>) -> Self {
        let user_agent = user_agent.filter(|text| !text.is_empty());
        let user_agent = user_agent.and_then(|text| HeaderValue::from_str(text).ok());
        Self { cookies, user_agent }
    }

    /// The cookies, the token's own among them.
    #[must_use]
    pub fn cookies(&self) -> &Cookies {
        &self.cookies
    }

    /// The cookies that a `Cookie` field can hold, as they stand in it.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, String)> {
        let fits = |text: &str| !text.contains(|c: char| c == ';' || c.is_control());
        let fitting = self.cookies.iter().filter(move |(name, value)| fits(name) && fits(value));
        fitting.map(|(name, value)| (name, format!("{name}={value}")))
    }

    /// The browser's `User-Agent`, if it is known.
    #[must_use]
    pub fn user_agent(&self) -> Option<&HeaderValue> {
        self.user_agent.as_ref()
    }

    /// Whether there is nothing to show.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cookies.is_empty() && self.user_agent.is_none()
    }

    /// The same user-agent with other cookies.
    #[must_use]
    pub fn with_cookies(&self, cookies: Cookies) -> Self {
        Self { cookies, user_agent: self.user_agent.clone() }
    }

    /// The value of a `Cookie` field, marked as sensitive; `None` where there
    /// is no cookie.
    #[must_use]
    pub fn cookie_field(&self) -> Option<HeaderValue> {
        let pairs: Vec<_> = self.pairs().map(|(_, pair)| pair).collect();
        let mut field = HeaderValue::try_from(pairs.join("; ")).ok()?;
        field.set_sensitive(true);
        (!field.is_empty()).then_some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_field_can_hold_is_left_out() {
        let cookies = [("a", "1"), ("b", "x;y"), ("c", "2"), ("d", "line\nbreak")];
        let clearance = Clearance::new(Cookies::from_pairs(cookies), Some("Agent\n1"));
        assert_eq!(clearance.cookie_field().unwrap(), "a=1; c=2");
        assert_eq!(clearance.user_agent(), None);
    }

    #[test]
    fn the_debug_form_hides_the_cookies() {
        let clearance = Clearance::new(Cookies::from_pairs([("cf", "hunter2")]), Some("Agent"));
        assert!(!format!("{clearance:?}").contains("hunter2"));
        assert!(!format!("{:?}", clearance.cookie_field()).contains("hunter2"));
        assert_eq!(Clearance::default().cookie_field(), None);
    }
}
