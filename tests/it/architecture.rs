//! The layers of the crate: a module imports only from modules to its left, never from siblings.

use std::fs;
use std::path::{Path, PathBuf};

/// The layers from left to right.
const LAYERS: [&[&str]; 8] = [
    &["config", "metrics", "telemetry"],
    &["hints", "token", "tls", "net"],
    &["refresh"],
    &["proxy", "admin", "fuzzing"],
    &["app"],
    &["cli"],
    &["lib"],
    &["main"],
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rust = files(&root)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    rust.map(|path| {
        (path.strip_prefix(&root).unwrap().to_owned(), fs::read_to_string(path).unwrap())
    })
    .collect()
}

/// The module of the crate's root in which a file lies.
fn module(file: &Path) -> String {
    let first = file.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The first names in `rest`: one, or those between braces.
fn names(rest: &str) -> Vec<String> {
    let word = |text: &str| {
        text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()
    };
    match rest.strip_prefix('{') {
        Some(list) => split_outside_braces(list)
            .iter()
            .map(|item| word(item))
            .filter(|name| !name.is_empty())
            .collect(),
        None => vec![word(rest)],
    }
}

/// The comma-separated items up to the brace that closes the list.
fn split_outside_braces(list: &str) -> Vec<String> {
    let (mut depth, mut items) = (0_usize, vec![String::new()]);
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth = if c == '{' { depth + 1 } else { depth - usize::from(c == '}') };
                items.last_mut().unwrap().push(c);
            }
        }
    }
    items
}

#[test]
fn modules_import_only_from_modules_to_their_left() {
    for (file, text) in sources() {
        let own = module(&file);
        if own == "lib" || own == "main" {
            continue;
        }
        let own_layer =
            layer(&own).unwrap_or_else(|| panic!("{}: `{own}` is in no layer", file.display()));
        for used in text.split("crate::").skip(1).flat_map(names) {
            let allowed = used == own || layer(&used).is_some_and(|used| used < own_layer);
            assert!(allowed, "{}: `{own}` must not import `{used}`", file.display());
        }
    }
}

#[test]
fn only_config_reads_the_environment() {
    for (file, text) in sources() {
        let reads = ["env::var", "env::vars", "env::var_os", "env::vars_os"]
            .iter()
            .any(|call| text.contains(call));
        assert!(!reads || module(&file) == "config", "{} reads the environment", file.display());
    }
}

/// Unit tests may judge certificates by hand, and try what is forbidden; the program may not.
#[test]
fn verification_of_certificates_cannot_be_switched_off() {
    let mut seen = 0;
    let tests = ["tests.rs", "testing.rs"];
    for (file, text) in sources() {
        if tests.iter().any(|name| file.ends_with(name)) {
            continue;
        }
        let program = text.split("#[cfg(test)]").next().unwrap_or_default();
        seen += usize::from(program.contains("ClientConfig::builder"));
        for way in [
            "dangerous(",
            "::danger",
            "danger_accept",
            "with_custom_certificate_verifier",
            "ServerCertVerifier",
            "accept_invalid",
        ] {
            assert!(!program.contains(way), "{}: {way}", file.display());
        }
    }
    assert!(seen >= 1, "no TLS client at all");
}

#[test]
fn every_file_says_what_it_is() {
    for (file, text) in sources() {
        assert!(text.starts_with("//!"), "{} has no header", file.display());
    }
}

#[test]
fn no_file_is_a_module_beside_its_folder() {
    let paths: Vec<PathBuf> = sources().into_iter().map(|(path, _)| path).collect();
    for path in &paths {
        let folder = path.with_extension("");
        assert!(
            !paths.iter().any(|other| other.starts_with(&folder) && other != path),
            "{}",
            path.display()
        );
    }
}

#[test]
fn nothing_is_left_to_do() {
    for (file, text) in sources() {
        for word in ["TODO", "FIXME", "todo!(", "unimplemented!("] {
            assert!(!text.contains(word), "{}: {word}", file.display());
        }
    }
}
