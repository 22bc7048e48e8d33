//! The guide says what the program says: each message, metric, code and hint that it quotes is in
//! the program, and each that is in the program, it quotes. Both languages say the same.

mod fleet;
mod markdown;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::time::Duration;

use token_sidecar::config::VARIABLES;
use token_sidecar::metrics::{Metrics, Route};

use markdown::{Chapter, Document, spans};
use source::{GAP, Message, Part, Source};

const GUIDES: [&str; 2] = ["TOKEN_UPDATE_GUIDE.md", "TOKEN_UPDATE_GUIDE.ru.md"];
const LEVELS: [&str; 4] = ["ERROR", "WARN", "INFO", "DEBUG"];

/// Files whose error texts people get to see.
const ERRORS: [&str; 8] = [
    "net/dial.rs",
    "net/parent.rs",
    "net/resolve.rs",
    "refresh/error.rs",
    "refresh/refresher.rs",
    "tls/mod.rs",
    "token/error.rs",
    "token/jwt.rs",
];

fn guides() -> [Document; 2] {
    GUIDES.map(Document::read)
}

/// Chapter `number` of the guide.
fn chapter(guide: &Document, number: usize) -> Chapter<'_> {
    let mut chapters = guide.chapters();
    assert_eq!(chapters.len(), 7, "{}", guide.name);
    chapters.swap_remove(number)
}

/// What the catalogue of failures quotes of the program.
fn quotes(guide: &Document) -> Vec<&str> {
    chapter(guide, 3).first_cells().into_iter().flat_map(spans).collect()
}

/// The parts of a quote between its gaps, without the variable's name that goes before the text
/// of a setting's error.
fn parts(quote: &str) -> Vec<&str> {
    let named =
        quote.split_once(": ").filter(|(name, _)| VARIABLES.iter().any(|v| v.name == *name));
    let text = named.map_or(quote, |(_, text)| text);
    text.split(GAP).map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// Whether all `parts` are in `text`, in this order.
fn has_all(text: &str, parts: &[&str]) -> bool {
    let after = |rest: &'_ str, part: &&str| rest.find(*part).map(|at| at + part.len());
    let mut at = 0;
    let in_order = parts.iter().all(|part| {
        let end = after(&text[at..], part);
        at += end.unwrap_or_default();
        end.is_some()
    });
    in_order && !parts.is_empty()
}

/// Whether `quote` gives enough of `text` to find it by.
fn is_quote_of(quote: &str, text: &str) -> bool {
    let parts = parts(quote);
    let count = |text: &str| text.chars().filter(|c| c.is_alphanumeric()).count();
    let given: usize = parts.iter().map(|part| count(part)).sum();
    has_all(text, &parts) && (given >= 20 || given * 10 >= count(text) * 6)
}

/// What the program says, as far as a quote may need it.
struct Program {
    messages: Vec<Message>,
    texts: BTreeSet<String>,
    words: BTreeSet<String>,
}

impl Program {
    fn read() -> Self {
        let sources = source::all();
        let texts = sources.iter().flat_map(|source| source.whole().texts());
        Self {
            messages: sources.iter().flat_map(Source::messages).collect(),
            texts: texts.map(str::to_owned).collect(),
            words: sources.iter().flat_map(Source::words).collect(),
        }
    }

    fn logs(&self, level: &str, text: &str) -> bool {
        self.messages.iter().any(|message| message.level == level && message.text == text)
    }

    fn says(&self, quote: &str) -> bool {
        let parts = parts(quote);
        self.texts.iter().any(|text| has_all(text, &parts))
    }

    /// Whether `quote` is the program's: a text, a field, a name, a command.
    fn knows(&self, quote: &str) -> bool {
        match quote.split_once(['=', ' ']) {
            Some((level, text)) if LEVELS.contains(&level) => self.logs(level, text),
            Some(("token-sidecar", command)) => self.has_command(command),
            Some((field, value)) if value.starts_with('"') => {
                self.words.contains(field) && self.texts.contains(value.trim_matches('"'))
            }
            None if VARIABLES.iter().any(|variable| variable.name == quote) => true,
            None if self.words.contains(quote) => true,
            _ => self.says(quote),
        }
    }

    /// Whether there is such a command; clap makes their names of the variants.
    fn has_command(&self, command: &str) -> bool {
        let name = command.split(' ').next().unwrap_or_default();
        let (first, rest) = name.split_at(1);
        self.words.contains(&format!("{}{rest}", first.to_uppercase()))
    }
}

#[test]
fn guides_quote_what_the_program_says() {
    let program = Program::read();
    for guide in guides() {
        let quotes = quotes(&guide);
        assert!(quotes.len() > 150, "{}: {}", guide.name, quotes.len());
        let is_line =
            |span: &&str| LEVELS.iter().any(|level| span.starts_with(&format!("{level} ")));
        let lines = guide.spans().into_iter().filter(is_line);
        let unsaid = quotes.into_iter().chain(lines).filter(|quote| !program.knows(quote));
        assert_eq!(unsaid.collect::<Vec<_>>(), [""; 0], "{}: nothing says that", guide.name);
    }
}

#[test]
fn guides_quote_every_log_message_from_info_up() {
    let messages: Vec<_> = source::all().iter().flat_map(Source::messages).collect();
    assert!(messages.len() > 60, "{messages:?}");
    for guide in guides() {
        let quotes = quotes(&guide);
        let known = messages.iter().filter(|message| message.level != "DEBUG");
        let lines = known.map(|message| format!("{} {}", message.level, message.text));
        check_none(lines.filter(|line| !quotes.contains(&line.as_str())), &guide);
    }
}

#[test]
fn guides_name_every_error_code() {
    let (proxy, admin) = (source::file("proxy/error.rs"), source::file("admin/error.rs"));
    let mut codes = proxy.whole().first_texts_after("face(");
    codes.extend(texts(&proxy.whole().bodies_of("mark_passed_on")));
    codes.extend(texts(&admin.whole().bodies_of("code")));
    // A type of RFC 9209, and no code.
    codes.retain(|code| *code != "proxy_internal_error");
    for known in ["upstream_tls", "hold_timeout", "target_not_allowed", "backoff", "cross_site"] {
        assert!(codes.contains(&known), "{known}: {codes:?}");
    }
    for guide in guides() {
        let quotes = quotes(&guide);
        check_none(codes.iter().filter(|code| !quotes.contains(code)), &guide);
    }
}

/// The text literals in `parts`.
fn texts<'a>(parts: &[Part<'a>]) -> Vec<&'a str> {
    parts.iter().flat_map(|part| part.texts()).collect()
}

/// Nothing is `missing` in `guide`.
fn check_none(missing: impl Iterator<Item: Display>, guide: &Document) {
    let missing: Vec<_> = missing.map(|text| text.to_string()).collect();
    assert_eq!(missing, [""; 0], "missing in {}", guide.name);
}

/// Each of `texts` is quoted well enough to find it by.
fn check_quoted(texts: &[&str]) {
    for guide in guides() {
        let quotes = quotes(&guide);
        let is_quoted = |text: &str| quotes.iter().any(|quote| is_quote_of(quote, text));
        check_none(texts.iter().filter(|text| !is_quoted(text)), &guide);
    }
}

#[test]
fn guides_quote_every_error() {
    let files = ERRORS.map(source::file);
    let texts = files.iter().flat_map(|file| file.whole().first_texts_after("#[error("));
    let texts: Vec<&str> = texts.collect();
    assert!(texts.len() > 60, "{texts:?}");
    // What only passes on another error has no words of its own.
    let own = |text: &&str| text.chars().filter(char::is_ascii_alphabetic).count() > 2;
    check_quoted(&texts.into_iter().filter(own).collect::<Vec<_>>());
}

#[test]
fn guides_quote_every_hint_and_its_kind() {
    let files = ["hints/mod.rs", "hints/silence.rs", "admin/status.rs"].map(source::file);
    let [hints, silence, status] = files.each_ref().map(Source::whole);
    let mut said = [hints, silence].map(|file| texts(&file.bodies_of("text"))).concat();
    for name in [
        "NO_TOKEN",
        "WALLED",
        "BLIND_VERIFIER",
        "UNVERIFIED",
        "REDIS_DOWN",
        "REDIS_LOCKED",
        "REDIS_REFUSES",
        "ENV_FILE_DOWN",
    ] {
        said.extend(status.first_texts_after(&format!("const {name}: &str =")));
    }
    assert_eq!(said.len(), 16, "{said:?}");
    check_quoted(&said);
    let mut kinds = texts(&hints.bodies_of("as_str"));
    kinds.push("no_api_request");
    assert_eq!(kinds.len(), 6, "{kinds:?}");
    for guide in guides() {
        let quotes = quotes(&guide);
        let fields = kinds.iter().map(|kind| format!("kind=\"{kind}\""));
        check_none(fields.filter(|field| !quotes.contains(&field.as_str())), &guide);
    }
}

/// The program's metrics by name, with the values of their labels; those of `status` and
/// `version` are open.
fn metrics() -> BTreeMap<String, BTreeMap<String, BTreeSet<String>>> {
    let metrics = Metrics::new(1);
    for route in Route::ALL {
        metrics.shard(0).request(route, 200, Duration::ZERO);
    }
    metrics.store_error("redis");
    for source in ["flaresolverr", "direct", "redis"] {
        metrics.refresh_finished(source, "ok", Duration::ZERO);
        metrics.refresh_finished(source, "failed", Duration::ZERO);
    }
    metrics.store_error("env_file");
    let text = metrics.encode();
    let mut found = BTreeMap::new();
    for (name, kind) in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' ')) {
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        found.insert(format!("{name}{suffix}"), BTreeMap::<_, BTreeSet<_>>::new());
    }
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, labels) = series(sample.split(' ').next().unwrap());
        let name = ["_bucket", "_sum", "_count"]
            .into_iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        for (label, value) in labels {
            let of_name = found.get_mut(name).unwrap_or_else(|| panic!("{sample}"));
            of_name.entry(label.to_owned()).or_default().insert(value.to_owned());
        }
    }
    found
}

/// Name and labels of `name{label="value",…}`.
fn series(text: &str) -> (&str, Vec<(&str, &str)>) {
    let (name, labels) = text.split_once('{').unwrap_or((text, ""));
    let labels = labels.trim_end_matches('}').split(',').filter(|pair| !pair.is_empty());
    let pairs = labels.map(|pair| pair.split_once('=').unwrap_or_else(|| panic!("{text}")));
    (name, pairs.map(|(label, value)| (label, value.trim_matches(['"', '~']))).collect())
}

/// Such a series can be.
fn check_series(text: &str, place: &str) {
    let known = metrics();
    let (name, labels) = series(text);
    let of_name = known.get(name).unwrap_or_else(|| panic!("{place}: there is no metric {name}"));
    for (label, values) in labels {
        let possible = of_name.get(label);
        let possible = possible.unwrap_or_else(|| panic!("{place}: {name} has no label {label}"));
        for value in values.split('|') {
            let is_status = label == "status" && value.parse().is_ok_and(|v: u16| v < 600);
            assert!(is_status || possible.contains(value), "{place}: {label}={value} of {name}");
        }
    }
}

#[test]
fn guides_name_no_metric_that_is_not_there() {
    for guide in guides() {
        let named: Vec<_> =
            guide.spans().into_iter().filter(|span| span.starts_with("sidecar_")).collect();
        assert!(named.len() > 60, "{}", guide.name);
        for text in named {
            check_series(text, guide.name);
        }
    }
}

#[test]
fn guides_explain_every_metric_and_every_value_of_its_labels() {
    for guide in guides() {
        let chapter = chapter(&guide, 4);
        let (rows, spans) = (chapter.first_cells(), chapter.spans());
        for (name, labels) in metrics() {
            let row = format!("`{name}`");
            assert!(rows.contains(&row.as_str()), "{}: {name} has no row", guide.name);
            for (label, values) in labels {
                let is_open = matches!(label.as_str(), "status" | "version");
                let values: Vec<_> = if is_open { vec![] } else { values.into_iter().collect() };
                for word in [vec![label.clone()], values].concat() {
                    let is_bound = label == "le";
                    assert!(
                        is_bound || spans.contains(&word.as_str()),
                        "{}: {name}: {word}",
                        guide.name
                    );
                }
            }
        }
    }
}

#[test]
fn alerts_ask_for_metrics_that_are_there_and_stand_in_the_guides() {
    let rules = Document::read("deploy/prometheus/token-sidecar.rules.yml").text();
    let starts: Vec<_> = rules.match_indices("sidecar_").map(|(at, _)| at).collect();
    assert!(starts.len() > 6, "{rules}");
    for start in starts {
        let rest = &rules[start..];
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap();
        let end = if rest[end..].starts_with('{') { rest.find('}').unwrap() + 1 } else { end };
        check_series(&rest[..end], "the alerts");
    }
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.split_once("- alert: ")).collect();
    assert_eq!(alerts.len(), 6);
    for guide in guides() {
        for (_, alert) in &alerts {
            let cell = format!("`{alert}`");
            assert!(
                chapter(&guide, 4).first_cells().contains(&cell.as_str()),
                "{}: {alert}",
                guide.name
            );
        }
    }
}

#[test]
fn both_languages_have_the_same_headings_tables_and_commands() {
    let [english, russian] = guides();
    let levels = |guide: &Document| -> Vec<usize> {
        guide.headings().into_iter().map(|(level, _)| level).collect()
    };
    assert_eq!(levels(&english), levels(&russian));
    assert_eq!(english.blocks(), russian.blocks());
    for (number, (english, russian)) in
        english.chapters().iter().zip(russian.chapters().iter()).enumerate()
    {
        assert_eq!(english.shape_of_tables(), russian.shape_of_tables(), "chapter {number}");
    }
}

#[test]
fn both_languages_name_the_same_things_in_each_chapter() {
    let [english, russian] = guides();
    for (number, (english, russian)) in
        english.chapters().iter().zip(russian.chapters().iter()).enumerate().skip(1)
    {
        let set = |chapter: &Chapter| -> BTreeSet<String> {
            chapter.spans().into_iter().map(str::to_owned).collect()
        };
        let (english, russian) = (set(english), set(russian));
        let only: Vec<_> = english.symmetric_difference(&russian).collect();
        assert!(only.is_empty(), "in one language only, chapter {number}: {only:#?}");
    }
}

#[test]
fn links_within_the_guides_lead_to_headings() {
    let readme = Document::read("README.md");
    for document in guides().iter().chain([&readme]) {
        for link in document.links() {
            let Some((file, anchor)) = link.split_once('#') else {
                continue;
            };
            let target = match file {
                "" => document.anchors(),
                "TOKEN_UPDATE_GUIDE.md" => Document::read("TOKEN_UPDATE_GUIDE.md").anchors(),
                other => panic!("{}: {other}", document.name),
            };
            assert!(target.iter().any(|known| known == anchor), "{}: #{anchor}", document.name);
        }
    }
}
