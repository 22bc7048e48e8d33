//! What the program can say, read out of its sources: text literals, log messages, error texts,
//! codes. Tests and comments in the sources do not count.

use std::fs;
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::str::Chars;

/// Stands for what differs from case to case.
pub(super) const GAP: char = '…';

/// A log message, with its level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) level: &'static str,
    pub(super) text: String,
}

/// A piece of a source file.
#[derive(Debug)]
enum Token {
    /// A character outside of texts and comments.
    Code(char),
    /// A text literal, with [`GAP`] for each of its placeholders.
    Text(String),
}

/// One source file.
pub(super) struct Source(Vec<Token>);

/// A part of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a>(&'a [Token]);

/// Every file below `src`.
pub(super) fn all() -> Vec<Source> {
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 50, "{files:?}");
    files.iter().map(|file| Source::read(file)).collect()
}

/// The file `name` below `src`.
pub(super) fn file(name: &str) -> Source {
    Source::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|kind| kind == "rs")
            && !["tests.rs", "testing.rs"].contains(&name)
        {
            files.push(path);
        }
    }
}

impl Source {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let tests = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
        Self(tokens(&text[..tests]))
    }

    /// All of it.
    pub(super) fn whole(&self) -> Part<'_> {
        Part(&self.0)
    }

    /// Its words outside of texts.
    pub(super) fn words(&self) -> Vec<String> {
        let code = self.0.iter().map(|token| match token {
            Token::Code(c) => *c,
            Token::Text(_) => ' ',
        });
        let code: String = code.collect();
        code.split(|c: char| !is_of_word(c)).map(str::to_owned).collect()
    }

    /// What it logs.
    pub(super) fn messages(&self) -> Vec<Message> {
        let levels = [("error", "ERROR"), ("warn", "WARN"), ("info", "INFO"), ("debug", "DEBUG")];
        let of = |(name, level): (&str, &'static str)| {
            let calls = self.whole().after(&format!("{name}!("));
            calls.into_iter().map(move |call| Message { level, text: call.to_end().message() })
        };
        levels.into_iter().flat_map(of).collect()
    }
}

impl<'a> Part<'a> {
    /// Its text literals.
    pub(super) fn texts(self) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter_map(|token| match token {
            Token::Text(text) => Some(text.as_str()),
            Token::Code(_) => None,
        })
    }

    /// The first text after each `what` that is no part of a longer word, up to the bracket that
    /// ends it.
    pub(super) fn first_texts_after(self, what: &str) -> Vec<&'a str> {
        let rests = self.after(what).into_iter();
        rests.filter_map(|rest| rest.to_end().texts().next()).collect()
    }

    /// The body of each function of that name.
    pub(super) fn bodies_of(self, function: &str) -> Vec<Self> {
        let body = |rest: Self| {
            let open = rest.0.iter().position(|token| matches!(token, Token::Code('{')));
            Self(&rest.0[open.unwrap() + 1..]).to_end()
        };
        self.after(&format!("fn {function}(")).into_iter().map(body).collect()
    }

    /// What follows each `what` that is no part of a longer word.
    fn after(self, what: &str) -> Vec<Self> {
        let what: Vec<char> = what.chars().collect();
        let is_of_more = |before: &Token| match before {
            Token::Code(c) => is_of_word(*c) || *c == '.',
            Token::Text(_) => false,
        };
        let is_here = |start: &usize| {
            let here = self.0[*start..].iter().take(what.len());
            let same =
                here.zip(&what).filter(|(token, c)| matches!(token, Token::Code(x) if x == *c));
            same.count() == what.len() && !self.0[..*start].last().is_some_and(is_of_more)
        };
        let starts = (0..self.0.len()).filter(is_here);
        starts.map(|start| Self(&self.0[start + what.len()..])).collect()
    }

    /// Up to the bracket that ends what was opened before.
    fn to_end(self) -> Self {
        let mut depth = 1;
        let end = self.0.iter().position(|token| {
            depth += step(token);
            depth == 0
        });
        Self(&self.0[..end.unwrap_or(self.0.len())])
    }

    /// The message among the arguments of a log macro: the field of that name, or else the text
    /// that is no field's.
    fn message(self) -> String {
        let (mut depth, mut before, mut found) = (0, String::new(), None);
        for token in self.0 {
            depth += step(token);
            match token {
                Token::Code(',') if depth == 0 => before.clear(),
                Token::Code(c) => before.push(*c),
                Token::Text(text) if depth == 0 => match before.trim() {
                    "message =" => return text.clone(),
                    "" => found = Some(text.clone()),
                    _ => {}
                },
                Token::Text(_) => {}
            }
        }
        found.unwrap_or_else(|| panic!("no message in {self:?}"))
    }
}

/// By how much a token changes the depth of brackets.
fn step(token: &Token) -> i32 {
    match token {
        Token::Code('(' | '[' | '{') => 1,
        Token::Code(')' | ']' | '}') => -1,
        _ => 0,
    }
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => while chars.next_if(|c| *c != '\n').is_some() {},
            '"' => tokens.push(Token::Text(shape(&literal(&mut chars)))),
            'r' if is_raw(&chars) => tokens.push(Token::Text(shape(&raw_literal(&mut chars)))),
            '\'' => character(&mut chars),
            c => tokens.push(Token::Code(c)),
        }
    }
    tokens
}

fn is_raw(chars: &Peekable<Chars>) -> bool {
    let mut rest = chars.clone().skip_while(|c| *c == '#');
    rest.next() == Some('"')
}

/// A literal without its opening quote, unescaped.
fn literal(chars: &mut Peekable<Chars>) -> String {
    let mut text = String::new();
    loop {
        match chars.next().unwrap() {
            '"' => return text,
            '\\' => match chars.next().unwrap() {
                '\n' => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                'n' => text.push('\n'),
                'r' => text.push('\r'),
                't' => text.push('\t'),
                escaped => text.push(escaped),
            },
            c => text.push(c),
        }
    }
}

fn raw_literal(chars: &mut Peekable<Chars>) -> String {
    let mut hashes = 0;
    while chars.next_if_eq(&'#').is_some() {
        hashes += 1;
    }
    chars.next();
    let end = format!("\"{}", "#".repeat(hashes));
    let mut text = String::new();
    while !text.ends_with(&end) {
        text.push(chars.next().unwrap());
    }
    text.truncate(text.len() - end.len());
    text
}

/// Passes over the rest of a character, or does nothing where a lifetime begins.
fn character(chars: &mut Peekable<Chars>) {
    let mut ahead = chars.clone();
    match (ahead.next(), ahead.next()) {
        (Some('\\'), Some(_)) => while chars.next().is_some_and(|c| c != '\'') {},
        (Some(_), Some('\'')) => drop((chars.next(), chars.next())),
        _ => {}
    }
}

/// `text` with [`GAP`] for each placeholder of a format string.
fn shape(text: &str) -> String {
    let mut shape = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let is_doubled = matches!(c, '{' | '}') && chars.next_if_eq(&c).is_some();
        if c == '{' && !is_doubled {
            while chars.next().is_some_and(|c| c != '}') {}
            shape.push(GAP);
        } else {
            shape.push(c);
        }
    }
    shape
}

#[test]
fn texts_and_messages_are_read_out_of_a_source() {
    let source = r#"
        // "no text"
        #[error("cannot {action} \"{}\": \
                 {reason}")]
        fn f<'a>(x: &'a str) { warn!(%x, n = len("x"), "it {{went}} wrong"); let c = '"'; }
        fn g() { tracing::error!(message = "boom", why = "none"); debug!(r~"a "b""~); }
    "#;
    let source = Source(tokens(&source.replace('~', "#")));
    let said: Vec<_> = source.messages().into_iter().map(|m| (m.level, m.text)).collect();
    let expected = [("ERROR", "boom"), ("WARN", "it {went} wrong"), ("DEBUG", "a \"b\"")];
    assert_eq!(said, expected.map(|(level, text)| (level, text.to_owned())));
    let whole = source.whole();
    assert_eq!(whole.first_texts_after("#[error("), ["cannot … \"…\": …"]);
    let bodies = whole.bodies_of("g");
    assert_eq!(bodies[0].texts().collect::<Vec<_>>(), ["boom", "none", "a \"b\""]);
    assert!(
        source.words().contains(&"tracing".to_owned())
            && !whole.texts().any(|text| text == "no text")
    );
}
