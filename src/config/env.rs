//! Reading of raw values: the process environment, then the env file.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use http::Uri;

use super::origin::has_usable_port;
use super::{ConfigError, VARIABLES};

/// Longest time that can be set: a deadline that far ahead can still be told.
const LONGEST: Duration = Duration::from_hours(24 * 10_000);

/// What some editors begin a file with; in the middle where files were joined.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The raw texts of all variables.
#[derive(Default)]
pub struct Env {
    process: BTreeMap<String, String>,
    file: BTreeMap<String, String>,
}

impl Env {
    /// Values given directly, for tests and stand-ins.
    pub fn from_pairs<K, V>(pairs: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<String>,
        V: Into<String>,
    {
        let process = pairs.into_iter().map(|(name, value)| (name.into(), value.into()));
        Self { process: process.collect(), file: BTreeMap::new() }
    }

    /// The process environment and, below it, the file that `ENV_FILE` names
    /// (default `.env` in the working folder). A missing file is no error,
    /// and a line that is no assignment is another program's affair.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for a file that cannot be read, or a line of it that
    /// names one of our variables and does not parse: to pass over it could
    /// leave a door open.
    #[expect(clippy::disallowed_methods, reason = "the only reader of the environment")]
    pub fn from_process() -> Result<Self, ConfigError> {
        let env = Self::from_pairs(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        );
        let path = env.path("ENV_FILE").unwrap_or_default();
        env.with_file(&read_file(&path)?)
    }

    /// The same with the assignments of an env file below.
    pub(crate) fn with_file(self, text: &str) -> Result<Self, ConfigError> {
        Ok(Self { file: parse_file(text)?, ..self })
    }

    /// The value of `name`, if one is given anywhere and not empty.
    #[must_use]
    pub fn given(&self, name: &'static str) -> Option<&str> {
        self.verbatim(name).map(str::trim)
    }

    /// The same with its blanks, which may belong to a password; only the end
    /// of a line goes.
    pub(super) fn verbatim(&self, name: &str) -> Option<&str> {
        let found = filled(&self.process, name).or_else(|| filled(&self.file, name))?;
        Some(found.trim_end_matches(['\r', '\n']))
    }

    /// The value of `name` in the process environment alone.
    #[must_use]
    pub fn in_process(&self, name: &str) -> Option<&str> {
        filled(&self.process, name).map(str::trim)
    }

    /// Names that look like a slip of the pen for one of ours, with ours.
    #[must_use]
    pub fn near_misses(&self) -> Vec<(String, &'static str)> {
        let names = self.process.keys().chain(self.file.keys());
        names.filter_map(|name| Some((name.clone(), near_miss(name)?))).collect()
    }

    /// The text of `name`, or its default.
    pub(super) fn text(&self, name: &'static str) -> &str {
        self.given(name).unwrap_or_else(|| default_of(name))
    }

    /// A path, or `None` where neither a value nor a default is there.
    pub(super) fn path(&self, name: &'static str) -> Option<PathBuf> {
        let text = self.text(name);
        (!text.is_empty()).then(|| PathBuf::from(text))
    }

    /// A span of time such as `500ms`, `10s`, `5m` or `3h`; more than nothing.
    pub(super) fn duration(&self, name: &'static str) -> Result<Duration, ConfigError> {
        let text = self.text(name);
        match humantime::parse_duration(text) {
            Ok(duration) if duration.is_zero() => Err(bad(name, text, "a time of more than zero")),
            Ok(duration) if duration > LONGEST => Err(bad(name, text, "a time of at most 10000d")),
            Ok(duration) => Ok(duration),
            Err(_) => Err(bad(name, text, "a time such as 500ms, 10s, 5m or 3h")),
        }
    }

    /// A number of bytes such as `64KiB` or `8MiB`.
    pub(super) fn size(&self, name: &'static str) -> Result<usize, ConfigError> {
        let text = self.text(name);
        let size = text.parse::<ByteSize>().ok();
        size.and_then(|size| usize::try_from(size.as_u64()).ok())
            .ok_or_else(|| bad(name, text, "a size such as 64KiB or 8MiB"))
    }

    /// A whole number within `range`.
    pub(super) fn count(
        &self,
        name: &'static str,
        range: RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        let text = self.text(name);
        let count = text.parse().ok().filter(|count| range.contains(count));
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        count.ok_or_else(|| bad(name, text, &expected))
    }

    /// One of the words of `choices`.
    pub(super) fn choice<T: Copy>(
        &self,
        name: &'static str,
        choices: &[(&'static str, T)],
    ) -> Result<T, ConfigError> {
        let text = self.text(name);
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        let found = choices.iter().find(|(word, _)| *word == text);
        found.map(|(_, value)| *value).ok_or_else(|| bad(name, text, &words.join(" or ")))
    }

    /// An address to listen on.
    pub(super) fn address(&self, name: &'static str) -> Result<SocketAddr, ConfigError> {
        let text = self.text(name);
        let local = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        let address = local.as_deref().unwrap_or(text).parse();
        address.map_err(|_| bad(name, text, "ip:port such as 127.0.0.1:8080"))
    }

    /// An `http://` or `https://` URL with a host and without credentials.
    pub(super) fn web_url(&self, name: &'static str) -> Result<Uri, ConfigError> {
        let text = self.text(name);
        let uri = text.parse::<Uri>().ok().filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.authority().is_some_and(|authority| {
                    !authority.as_str().contains('@') && has_usable_port(authority)
                })
        });
        // The text is not shown: it may hold credentials.
        uri.ok_or_else(|| {
            ConfigError::new(name, "expected an http:// or https:// URL without credentials")
        })
    }

    /// What `parse` makes of the value; `None` where none is given.
    pub(super) fn parsed<T>(
        &self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let parsed = self.given(name).map(parse).transpose();
        parsed.map_err(|problem| ConfigError::new(name, problem))
    }

    /// A list separated by commas, each item read by `parse`. Items are never
    /// empty; the list is so only where neither a value nor a default is there.
    pub(super) fn list<T>(
        &self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, ConfigError> {
        let text = self.text(name);
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let list: Result<Vec<T>, String> = items.map(parse).collect();
        let list = list.map_err(|problem| ConfigError::new(name, problem))?;
        if list.is_empty() && !text.is_empty() {
            return Err(ConfigError::new(
                name,
                "the list is empty: name at least one, or leave it unset",
            ));
        }
        Ok(list)
    }
}

fn bad(name: &'static str, text: &str, expected: &str) -> ConfigError {
    ConfigError::new(name, format!("{text:?} is not usable, expected {expected}"))
}

fn default_of(name: &'static str) -> &'static str {
    let variable = VARIABLES.iter().find(|variable| variable.name == name);
    variable.map_or("", |variable| variable.default)
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => {
            let problem = format!("cannot read {}: {error}", path.display());
            Err(ConfigError::new("ENV_FILE", problem))
        }
    }
}

/// The assignments of an env file. Values are literal: no `$` is expanded, so
/// that a password is what it looks like.
fn parse_file(text: &str) -> Result<BTreeMap<String, String>, ConfigError> {
    let mut values = BTreeMap::new();
    let unmarked = |line| str::strip_prefix(line, BYTE_ORDER_MARK).unwrap_or(line);
    for line in text.lines().map(unmarked).map(str::trim).filter(|line| !line.starts_with('#')) {
        let exported = line.strip_prefix("export").filter(|rest| rest.starts_with([' ', '\t']));
        let line = exported.unwrap_or(line);
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let name = name.trim();
        match (parse_value(value.trim()), known(name)) {
            (Some(value), _) => drop(values.insert(name.to_owned(), value)),
            (None, Some(name)) => {
                let problem =
                    "its line in ENV_FILE has a quote that does not end, or text after it";
                return Err(ConfigError::new(name, problem));
            }
            (None, None) => {}
        }
    }
    Ok(values)
}

/// A value in double quotes (`\"` and `\\` are escapes), in single quotes, or
/// bare up to ` #`.
fn parse_value(text: &str) -> Option<String> {
    let comment_only = |rest: &str| rest.trim().is_empty() || rest.trim().starts_with('#');
    match text.chars().next() {
        Some('\'') => {
            let (value, rest) = text[1..].split_once('\'')?;
            comment_only(rest).then(|| value.to_owned())
        }
        Some('"') => {
            let mut value = String::new();
            let mut chars = text[1..].chars();
            loop {
                match chars.next()? {
                    '"' => return comment_only(chars.as_str()).then_some(value),
                    '\\' => match chars.next()? {
                        escaped @ ('"' | '\\') => value.push(escaped),
                        other => value.extend(['\\', other]),
                    },
                    plain => value.push(plain),
                }
            }
        }
        _ => {
            let bare = if text.starts_with('#') { "" } else { text.split(" #").next()? };
            Some(bare.trim().to_owned())
        }
    }
}

fn known(name: &str) -> Option<&'static str> {
    VARIABLES.iter().map(|variable| variable.name).find(|known| *known == name)
}

/// The value of `name`, unless it is blank: that counts as unset.
fn filled<'a>(values: &'a BTreeMap<String, String>, name: &str) -> Option<&'a str> {
    let value = values.get(name).map(String::as_str);
    value.filter(|value| !value.trim().is_empty())
}

fn near_miss(name: &str) -> Option<&'static str> {
    if known(name).is_some() {
        return None;
    }
    let mut names = VARIABLES.iter().map(|variable| variable.name);
    names.find(|known| known.len() > 6 && strsim::osa_distance(known, name) == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, value: &str) {
        let values = parse_file(line).unwrap();
        assert_eq!(values.get("PROXY_AUTH").map(String::as_str), Some(value), "{line}");
    }

    #[test]
    fn password_keeps_its_blanks() {
        let env = |value: &str| Env::from_pairs([("REDIS_PASSWORD", value)]);
        assert_eq!(env(" a b ").verbatim("REDIS_PASSWORD"), Some(" a b "));
        assert_eq!(env("a\r\n").verbatim("REDIS_PASSWORD"), Some("a"));
        assert_eq!(env(" \n").verbatim("REDIS_PASSWORD"), None);
        let file = parse_file("REDIS_PASSWORD=' in a file '").unwrap();
        let env = Env { process: env(" ").process, file };
        assert_eq!(env.verbatim("REDIS_PASSWORD"), Some(" in a file "));
        assert_eq!(env.given("REDIS_PASSWORD"), Some("in a file"));
    }

    #[test]
    fn values_are_what_they_look_like() {
        check("PROXY_AUTH=user:pa ss", "user:pa ss");
        check("PROXY_AUTH=user:pa$word", "user:pa$word");
        check("  export PROXY_AUTH = u:p#x # note", "u:p#x");
        check("PROXY_AUTH='u:p\"$ # x' # note", "u:p\"$ # x");
        check("PROXY_AUTH=\"u:\\\"p\\\\ $x\"", "u:\"p\\ $x");
        check("PROXY_AUTH=\r\nPROXY_AUTH=a:b\r\n", "a:b");
        check("PROXY_AUTH=# none", "");
        check("export\tPROXY_AUTH=a:b", "a:b");
        check("\u{feff}PROXY_AUTH=a:b\n", "a:b");
        check("A=1\n\u{feff}PROXY_AUTH=a:b\n", "a:b");
    }

    #[test]
    fn a_broken_line_of_ours_is_an_error_and_others_are_not_our_affair() {
        let error = parse_file("A=1\nPROXY_AUTH=\"user:pass\n").unwrap_err();
        assert!(error.to_string().starts_with("PROXY_AUTH:"), "{error}");
        assert!(!error.to_string().contains("pass\""), "{error}");
        assert_eq!(parse_file("OTHER=\"x\nno assignment\n# c=\"\n").unwrap().len(), 0);
    }

    #[test]
    fn no_time_at_all_is_told_from_what_is_no_time() {
        let error =
            |text| Env::from_pairs([("TOKEN_TTL", text)]).duration("TOKEN_TTL").unwrap_err();
        assert!(error("0s").to_string().ends_with("expected a time of more than zero"));
        assert!(
            error("soon").to_string().ends_with("expected a time such as 500ms, 10s, 5m or 3h")
        );
        for endless in ["10001days", "18446744073709551615s"] {
            assert!(error(endless).to_string().ends_with("expected a time of at most 10000d"));
        }
    }

    #[test]
    fn a_list_that_is_given_is_not_empty() {
        let list = |text| {
            Env::from_pairs([("UPSTREAM_DNS", text)]).list("UPSTREAM_DNS", |item| Ok(item.len()))
        };
        assert_eq!(
            list(" , ").unwrap_err().to_string(),
            "UPSTREAM_DNS: the list is empty: name at least one, or leave it unset"
        );
        assert_eq!(list("a,,bc").unwrap(), [1, 2]);
        assert!(list("").unwrap().is_empty(), "empty counts as unset");
    }

    #[test]
    fn a_folder_is_no_env_file() {
        let folder = tempfile::TempDir::new().unwrap();
        let error = read_file(folder.path()).unwrap_err();
        assert!(error.to_string().starts_with("ENV_FILE:"), "{error}");
        assert!(read_file(&folder.path().join("none")).unwrap().is_empty());
    }
}
