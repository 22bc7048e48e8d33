//! A guide, taken apart: headings, tables, code.

use std::fs;
use std::path::Path;

/// A text in Markdown.
pub(super) struct Document {
    pub(super) name: &'static str,
    lines: Vec<Line>,
}

/// A line, and where it stands.
struct Line {
    text: String,
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Prose,
    /// Between the fences, in the block of that number.
    Block(usize),
    Fence,
}

impl Document {
    /// The file `name` of the repository.
    pub(super) fn read(name: &'static str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let text = fs::read_to_string(path).unwrap();
        let (mut lines, mut block, mut is_open) = (Vec::new(), 0, false);
        for text in text.lines().map(str::to_owned) {
            let place = match (text.starts_with("```"), is_open) {
                (true, _) => Place::Fence,
                (false, true) => Place::Block(block),
                (false, false) => Place::Prose,
            };
            block += usize::from(place == Place::Fence && is_open);
            is_open ^= place == Place::Fence;
            lines.push(Line { text, place });
        }
        assert!(!is_open && lines.len() > 50, "{name}");
        Self { name, lines }
    }

    fn prose(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(|line| line.place == Place::Prose).map(|line| line.text.as_str())
    }

    /// All of it.
    pub(super) fn text(&self) -> String {
        self.lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// Its headings with their levels.
    pub(super) fn headings(&self) -> Vec<(usize, &str)> {
        self.prose().filter_map(heading).collect()
    }

    /// The prose of each chapter; the first is what stands before them.
    pub(super) fn chapters(&self) -> Vec<Chapter<'_>> {
        let mut chapters = vec![Chapter(Vec::new())];
        for line in self.prose() {
            if line.starts_with("## ") {
                chapters.push(Chapter(Vec::new()));
            }
            chapters.last_mut().unwrap().0.push(line);
        }
        chapters
    }

    /// The contents of its code blocks, without comments and blank lines.
    pub(super) fn blocks(&self) -> Vec<Vec<&str>> {
        let mut blocks: Vec<Vec<&str>> = Vec::new();
        for line in &self.lines {
            let Place::Block(number) = line.place else {
                continue;
            };
            blocks.resize(blocks.len().max(number + 1), Vec::new());
            let text = line.text.split("  # ").next().unwrap_or_default().trim_end();
            if !text.is_empty() && !text.trim_start().starts_with("# ") {
                blocks[number].push(text);
            }
        }
        blocks
    }

    /// Where its links lead.
    pub(super) fn links(&self) -> Vec<&str> {
        let targets = |line: &'_ str| -> Vec<usize> {
            line.match_indices("](").map(|(at, _)| at + 2).collect()
        };
        let of = |line| targets(line).into_iter().map(move |at: usize| &line[at..]);
        self.prose().flat_map(of).map(|rest| &rest[..rest.find(')').unwrap()]).collect()
    }

    /// The anchors of its headings, as GitHub makes them.
    pub(super) fn anchors(&self) -> Vec<String> {
        let anchor = |(_, title): (usize, &str)| -> String {
            let kept = title.to_lowercase().replace(' ', "-");
            kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
        };
        self.headings().into_iter().map(anchor).collect()
    }

    /// The code spans of its prose.
    pub(super) fn spans(&self) -> Vec<&str> {
        self.prose().flat_map(spans).collect()
    }
}

/// The lines of a part of a document.
pub(super) struct Chapter<'a>(Vec<&'a str>);

impl<'a> Chapter<'a> {
    /// Its code spans.
    pub(super) fn spans(&self) -> Vec<&'a str> {
        self.0.iter().flat_map(|line| spans(line)).collect()
    }

    /// The first cells of the rows of its tables, without those of the headers.
    pub(super) fn first_cells(&self) -> Vec<&'a str> {
        let rows = self.0.iter().filter(|line| line.starts_with("| "));
        let headers: Vec<_> =
            self.0.windows(2).filter(|pair| pair[1].starts_with("|---")).collect();
        let is_header = |row: &str| headers.iter().any(|pair| pair[0] == row);
        let rows = rows.filter(|row| !is_header(row));
        rows.map(|row| row[2..].split(" | ").next().unwrap_or_default()).collect()
    }

    /// The number of cells of each line that belongs to a table.
    pub(super) fn shape_of_tables(&self) -> Vec<usize> {
        let rows = self.0.iter().filter(|line| line.starts_with('|'));
        rows.map(|row| row.replace("---", " ").matches('|').count()).collect()
    }
}

fn heading(line: &str) -> Option<(usize, &str)> {
    let title = line.trim_start_matches('#');
    let level = line.len() - title.len();
    (level > 0).then(|| (level, title.trim()))
}

/// What stands between backquotes; between two of them one may stand.
pub(super) fn spans(line: &str) -> Vec<&str> {
    let (mut spans, mut rest) = (Vec::new(), line);
    while let Some(start) = rest.find('`') {
        let quotes = rest[start..].len() - rest[start..].trim_start_matches('`').len();
        let (fence, inside) = rest[start..].split_at(quotes);
        let end = inside.find(fence).unwrap_or_else(|| panic!("not closed: {line}"));
        spans.push(inside[..end].trim());
        rest = &inside[end + quotes..];
    }
    spans
}

#[test]
fn spans_of_one_and_of_two_backquotes_are_read() {
    assert_eq!(spans("a `b c` d ``e `f` `` `g`"), ["b c", "e `f`", "g"]);
}
