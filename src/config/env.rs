//! Reading of raw values: the process environment, then the env file.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use http::Uri;

use super::{ConfigError, VARIABLES};

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
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the only reader of the environment")]
    pub fn from_process() -> Self {
        let mut env = Self::from_pairs(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))),
        );
        let path = env.path("ENV_FILE").unwrap_or_default();
        env.file = read_file(&path);
        env
    }

    /// The value of `name`, if one is given anywhere and not empty.
    #[must_use]
    pub fn given(&self, name: &'static str) -> Option<&str> {
        let in_file = || self.file.get(name).map(|value| value.trim());
        let found = self.in_process(name).or_else(in_file);
        found.filter(|value| !value.is_empty())
    }

    /// The value of `name` in the process environment alone.
    #[must_use]
    pub fn in_process(&self, name: &str) -> Option<&str> {
        let value = self.process.get(name).map(|value| value.trim());
        value.filter(|value| !value.is_empty())
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
            Ok(duration) if !duration.is_zero() => Ok(duration),
            _ => Err(bad(name, text, "a time such as 500ms, 10s, 5m or 3h")),
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
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        });
        // The text is not shown: it may hold credentials.
        uri.ok_or_else(|| {
            ConfigError::new(name, "expected an http:// or https:// URL without credentials")
        })
    }

    /// A list separated by commas, each item read by `parse`. Items are never
    /// empty; the list is so only where the default is.
    pub(super) fn list<T>(
        &self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, ConfigError> {
        let items = self.text(name).split(',').map(str::trim).filter(|item| !item.is_empty());
        let list: Result<Vec<T>, String> = items.map(parse).collect();
        let list = list.map_err(|problem| ConfigError::new(name, problem))?;
        if list.is_empty() && !default_of(name).is_empty() {
            return Err(ConfigError::new(name, "the list is empty"));
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

fn read_file(path: &Path) -> BTreeMap<String, String> {
    let Ok(lines) = dotenvy::from_path_iter(path) else {
        return BTreeMap::new();
    };
    lines.filter_map(Result::ok).collect()
}

fn near_miss(name: &str) -> Option<&'static str> {
    let ours = |known: &&'static str| *known == name;
    let mut known = VARIABLES.iter().map(|variable| variable.name);
    if known.clone().any(|known| ours(&known)) {
        return None;
    }
    known.find(|known| known.len() > 6 && strsim::osa_distance(known, name) == 1)
}
